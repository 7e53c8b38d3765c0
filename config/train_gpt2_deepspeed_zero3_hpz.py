# ZeRO-3, gathering parameters for backward within a node (hpZ); recipe and val loss as in config/train_gpt2.py.
#   HOSTFILE=hostfile ./launch_deepspeed_zero3_hpz.sh config/train_gpt2_deepspeed_zero3_hpz.py
from config.train_gpt2 import *
out_dir = 'out-gpt2-zero3-hpz'
deepspeed_config = 'deepspeed_configs/zero3_hpz_config.json'
