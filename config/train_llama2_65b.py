# The shape of the first LLaMA, 65B (Touvron et al., arXiv:2302.13971): 65.3B parameters. Val loss: not measured.
#   HOSTFILE=hostfile ./launch_deepspeed_zero1.sh config/train_llama2_65b.py --compile=False \
#       --sequence_parallel=4 --pipeline_parallel=16
# python -m tools.plan config/train_llama2_65b.py --vocab_size=32000 --device=H100 --nodes=8 --link=3200 --layouts
# Predicted for 64 H100: 64 GB each and 71,000 tokens/s; without a layout, FSDP2 62 GB and 58,000.
# For 32 (--nodes=4): tensor 4 x sequence 2 x pipeline 4, 74 GB and 33,000; without a layout, FSDP2 62 and 29,000.
from config.train_llama2_13b import *
out_dir = 'out-llama-65b'
n_layer = 80
n_head = 64
n_embd = 8192
n_hidden = 22016
block_size = 2048
gradient_accumulation_steps = 2048  # 2048 * 1 * 2048 = 4,194,304 tokens per step
