# ZeRO-0: nothing is partitioned, like DDP; data, recipe and val loss as in config/train_gpt2.py.
#   ./launch_deepspeed_zero0.sh 8 config/train_gpt2_deepspeed_zero0.py
from config.train_gpt2 import *
out_dir = 'out-gpt2-zero0'
deepspeed_config = 'deepspeed_configs/zero0_config.json'
