# GPT-2 xl, 1558M parameters, on OpenWebText. OpenAI's weights of this size reach val loss 2.54 (nanoGPT's README).
#   ./launch_traditional_ddp.sh 8 config/train_gpt2_xl.py         GPUs with 80 GB
#   With 40 GB: ./launch_fsdp.sh, --batch_size=2 --gradient_accumulation_steps=240 --activation_checkpointing=True
from config.train_gpt2_medium import *  # 80 * 6 * 1024 = 491,520 tokens per step, too
out_dir = 'out-gpt2-xl'
n_layer = 48
n_head = 25
n_embd = 1600
learning_rate = 2e-4  # GPT-3 paper, table 2.1
min_lr = 2e-5
