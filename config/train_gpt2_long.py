# GPT-2 124M with 16,384 tokens of context, each sequence on 2 ranks or more (sequence_parallel).
#   ./launch_deepspeed_long.sh 8 config/train_gpt2_long.py    Val loss: not measured.
from config.train_gpt2 import *
out_dir = 'out-gpt2-long'
block_size = 16384
batch_size = 1
gradient_accumulation_steps = 32  # 32 * 1 * 16384 = 524,288 tokens per step
activation_checkpointing = True
