# Llama's blocks (RMSNorm, RoPE, SwiGLU) with 124M parameters, and the data and budget of config/train_gpt2.py.
#   ./launch_traditional_ddp.sh 8 config/train_llama_124m.py
#   ./launch_fsdp.sh 8 config/train_llama_124m.py
from config.train_gpt2 import *
out_dir = 'out-llama-124m'
norm = 'rmsnorm'
mlp = 'swiglu'
n_hidden = 2048  # 3 x 768 x 2048 parameters, as 2 x 768 x 3072 of GPT-2
rope_theta = 10000.0
