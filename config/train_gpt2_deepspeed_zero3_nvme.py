# GPT-2 124M on OpenWebText with ZeRO-3: all of the model state partitioned, and kept on NVMe disks.
#
#   python data/openwebtext/prepare.py
#   ./launch_deepspeed_zero3_nvme.sh 8 --nvme_path=/mnt/nvme0 config/train_gpt2_deepspeed_zero3_nvme.py
#
# The recipe, and so the loss, is that of config/train_gpt2.py.

from config.train_gpt2 import *

out_dir = 'out-gpt2-zero3-nvme'
wandb_run_name = 'gpt2-124M-zero3-nvme'
deepspeed_config = 'deepspeed_configs/zero3_nvme_config.json'
