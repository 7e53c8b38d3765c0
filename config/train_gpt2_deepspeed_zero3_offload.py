# GPT-2 124M on OpenWebText with ZeRO-3: all of the model state partitioned, and kept in the CPU's memory.
#
#   python data/openwebtext/prepare.py
#   ./launch_deepspeed_zero3_offload.sh 8 config/train_gpt2_deepspeed_zero3_offload.py
#
# The recipe, and so the loss, is that of config/train_gpt2.py.

from config.train_gpt2 import *

out_dir = 'out-gpt2-zero3-offload'
wandb_run_name = 'gpt2-124M-zero3-offload'
deepspeed_config = 'deepspeed_configs/zero3_offload_config.json'
