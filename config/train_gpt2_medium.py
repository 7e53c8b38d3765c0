# GPT-2 medium, 350M parameters, on OpenWebText. OpenAI's weights of this size reach val loss 2.84 (nanoGPT's README).
#   ./launch_traditional_ddp.sh 8 config/train_gpt2_medium.py
from config.train_gpt2 import *
out_dir = 'out-gpt2-medium'
gradient_accumulation_steps = 80
batch_size = 6  # 80 * 6 * 1024 = 491,520 tokens per step, as for 124M
n_layer = 24
n_head = 16
n_embd = 1024
learning_rate = 3e-4  # GPT-3 paper, table 2.1
min_lr = 3e-5
