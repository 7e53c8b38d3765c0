# FSDP2: parameters, gradients and optimizer states are sharded; data, recipe and val loss as in config/train_gpt2.py.
#   ./launch_fsdp.sh 8 config/train_gpt2_fsdp.py
from config.train_gpt2 import *
out_dir = 'out-gpt2-fsdp'
wandb_run_name = 'gpt2-124M-fsdp'
strategy = 'fsdp'
reshard_after_forward = True  # False: SHARD_GRAD_OP, which keeps gathered parameters until the end of the micro-step
shard_ranks = 0               # 8 on several nodes of 8 GPUs: HSDP, which gathers parameters inside a node only
