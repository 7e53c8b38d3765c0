# The shape of Llama 2 13B (Touvron et al., arXiv:2307.09288): 13.0B parameters. Val loss: not measured.
#   ./launch_fsdp.sh 8 config/train_llama2_13b.py    or ./launch_deepspeed_zero3.sh, ./launch_deepspeed_zero3_offload.sh
# python -m tools.plan config/train_llama2_13b.py --vocab_size=32000 --device=H100 --gpus=8
# Predicted for 8 H100: FSDP2 68 GB each and 45,000 tokens/s, ZeRO-3 69 and 45,000, offloaded 75 and 26,000.
# For 32 (HOSTFILE=hostfile; --nodes=4 --link=3200), FSDP2: 48 and 181,000; for 64: 45 and 362,000; no layout is faster.
from config.train_llama2_7b import *
out_dir = 'out-llama2-13b'
n_layer = 40
n_head = 40
n_embd = 5120
n_hidden = 13824
batch_size = 1
gradient_accumulation_steps = 128  # 128 * 1 * 4096 = 524,288 tokens per step
