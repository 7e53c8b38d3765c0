# The shape of Llama 2 70B (Touvron et al., arXiv:2307.09288): 69.0B parameters. Val loss: not measured.
#   HOSTFILE=hostfile ./launch_deepspeed_zero1.sh config/train_llama2_70b.py --compile=False \
#       --tensor_parallel=2 --sequence_parallel=4 --pipeline_parallel=8
# python -m tools.plan config/train_llama2_70b.py --vocab_size=32000 --device=H100 --nodes=8 --link=3200 --layouts
# Predicted for 64 H100: 71 GB each and 64,000 tokens/s; without a layout, FSDP2 65 GB and 53,000.
# For 32 (--nodes=4): FSDP2 (./launch_fsdp.sh) 66 GB and 27,000, and no layout is faster.
from config.train_llama2_65b import *
out_dir = 'out-llama2-70b'
n_kv_head = 8
n_hidden = 28672
block_size = 4096
gradient_accumulation_steps = 1024  # 1024 * 1 * 4096 = 4,194,304 tokens per step
