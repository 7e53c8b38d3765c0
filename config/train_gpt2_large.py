# GPT-2 large, 774M parameters, on OpenWebText. OpenAI's weights of this size reach val loss 2.67 (nanoGPT's README).
#   ./launch_traditional_ddp.sh 8 config/train_gpt2_large.py      GPUs with 80 GB
#   With 40 GB: --batch_size=3 --gradient_accumulation_steps=160 --activation_checkpointing=True
from config.train_gpt2 import *
out_dir = 'out-gpt2-large'
n_layer = 36
n_head = 20
n_embd = 1280
learning_rate = 2.5e-4  # GPT-3 paper, table 2.1
min_lr = 2.5e-5
