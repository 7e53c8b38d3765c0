# ZeRO-2 with the optimizer offloaded to the CPU; data, recipe and val loss as in config/train_gpt2.py.
#   ./launch_deepspeed_zero2_offload.sh 8 config/train_gpt2_deepspeed_zero2_offload.py
from config.train_gpt2 import *
out_dir = 'out-gpt2-zero2-offload'
deepspeed_config = 'deepspeed_configs/zero2_offload_config.json'
