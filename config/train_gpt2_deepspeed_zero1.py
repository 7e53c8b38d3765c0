# ZeRO-1: optimizer states are partitioned; data, recipe and val loss as in config/train_gpt2.py.
#   ./launch_deepspeed_zero1.sh 8 config/train_gpt2_deepspeed_zero1.py
from config.train_gpt2 import *
out_dir = 'out-gpt2-zero1'
deepspeed_config = 'deepspeed_configs/zero1_config.json'
