# FSDP2: parameters, gradients and optimizer states are sharded; data, recipe and val loss as in config/train_gpt2.py.
#   ./launch_fsdp.sh 8 config/train_gpt2_fsdp.py
from config.train_gpt2 import *
out_dir = 'out-gpt2-fsdp'
strategy = 'fsdp'
