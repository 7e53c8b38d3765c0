# ZeRO-3 with parameters and optimizer offloaded to NVMe; data, recipe and val loss as in config/train_gpt2.py.
#   ./launch_deepspeed_zero3_nvme.sh 8 --nvme_path=/mnt/nvme0 config/train_gpt2_deepspeed_zero3_nvme.py
from config.train_gpt2 import *
out_dir = 'out-gpt2-zero3-nvme'
deepspeed_config = 'deepspeed_configs/zero3_nvme_config.json'
