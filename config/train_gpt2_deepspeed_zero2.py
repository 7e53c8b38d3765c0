# ZeRO-2: optimizer states and gradients are partitioned; data, recipe and val loss as in config/train_gpt2.py.
#   ./launch_deepspeed_zero2.sh 8 config/train_gpt2_deepspeed_zero2.py
from config.train_gpt2 import *
out_dir = 'out-gpt2-zero2'
deepspeed_config = 'deepspeed_configs/zero2_config.json'
