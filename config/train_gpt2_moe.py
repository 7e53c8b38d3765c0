# GPT-2 124M with 8 experts in each block, 2 for each token: as many active parameters as the dense model, 294M in all.
#   ./launch_traditional_ddp.sh 8 config/train_gpt2_moe.py
#   ./launch_deepspeed_moe.sh 8 config/train_gpt2_moe.py --expert_parallel=8    Val loss: not measured.
from config.train_gpt2 import *
out_dir = 'out-gpt2-moe'
mlp = 'swiglu'
n_hidden = 1024
n_expert = 8
compile = False  # torch compiles their matmul in bfloat16 only
