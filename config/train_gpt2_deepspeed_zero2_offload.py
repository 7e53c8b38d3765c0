# GPT-2 124M on OpenWebText with ZeRO-2: optimizer states and gradients partitioned, the optimizer on the CPU.
#
#   python data/openwebtext/prepare.py
#   ./launch_deepspeed_zero2_offload.sh 8 config/train_gpt2_deepspeed_zero2_offload.py
#
# The recipe, and so the loss, is that of config/train_gpt2.py.

from config.train_gpt2 import *

out_dir = 'out-gpt2-zero2-offload'
wandb_run_name = 'gpt2-124M-zero2-offload'
deepspeed_config = 'deepspeed_configs/zero2_offload_config.json'
