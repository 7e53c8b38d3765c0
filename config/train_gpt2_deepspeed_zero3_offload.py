# ZeRO-3 with parameters and optimizer offloaded to host memory; data, recipe and val loss as in config/train_gpt2.py.
#   ./launch_deepspeed_zero3_offload.sh 8 config/train_gpt2_deepspeed_zero3_offload.py
from config.train_gpt2 import *
out_dir = 'out-gpt2-zero3-offload'
deepspeed_config = 'deepspeed_configs/zero3_offload_config.json'
