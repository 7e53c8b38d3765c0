# ZeRO-3: all model states are partitioned; data, recipe and val loss as in config/train_gpt2.py.
#   ./launch_deepspeed_zero3.sh 8 config/train_gpt2_deepspeed_zero3.py
from config.train_gpt2 import *
out_dir = 'out-gpt2-zero3'
deepspeed_config = 'deepspeed_configs/zero3_config.json'
