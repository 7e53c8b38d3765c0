# GPT-2 124M on OpenWebText with ZeRO-3: optimizer states, gradients and parameters partitioned.
#
#   python data/openwebtext/prepare.py
#   ./launch_deepspeed_zero3.sh 8 config/train_gpt2_deepspeed_zero3.py
#
# The recipe, and so the loss, is that of config/train_gpt2.py.

from config.train_gpt2 import *

out_dir = 'out-gpt2-zero3'
wandb_run_name = 'gpt2-124M-zero3'
deepspeed_config = 'deepspeed_configs/zero3_config.json'
