# GPT-2 124M on OpenWebText with FSDP2: parameters, gradients and optimizer states sharded.
#
#   python data/openwebtext/prepare.py
#   ./launch_fsdp.sh 8 config/train_gpt2_fsdp.py
#
# The recipe, and so the loss, is that of config/train_gpt2.py.

from config.train_gpt2 import *

out_dir = 'out-gpt2-fsdp'
wandb_run_name = 'gpt2-124M-fsdp'
strategy = 'fsdp'
reshard_after_forward = True  # False: SHARD_GRAD_OP, which gathers once a micro-step and holds the gathered weights
shard_ranks = 0               # 8 on several nodes of 8 GPUs: HSDP, which gathers inside a node only
