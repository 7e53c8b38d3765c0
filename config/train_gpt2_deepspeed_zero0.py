# GPT-2 124M on OpenWebText with ZeRO-0: nothing partitioned; what DDP does, by DeepSpeed.
#
#   python data/openwebtext/prepare.py
#   ./launch_deepspeed_zero0.sh 8 config/train_gpt2_deepspeed_zero0.py
#
# The recipe, and so the loss, is that of config/train_gpt2.py.

from config.train_gpt2 import *

out_dir = 'out-gpt2-zero0'
wandb_run_name = 'gpt2-124M-zero0'
deepspeed_config = 'deepspeed_configs/zero0_config.json'
