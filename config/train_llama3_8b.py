# The shape of Llama 3 8B (Dubey et al., arXiv:2407.21783): 8.0B parameters. Val loss: not measured.
#   ./launch_fsdp.sh 8 config/train_llama3_8b.py    or ./launch_deepspeed_zero3.sh, ./launch_deepspeed_zero3_offload.sh
# python -m tools.plan config/train_llama3_8b.py --vocab_size=128256 --device=H100 --gpus=8
# Predicted for 8 H100: FSDP2 74 GB each and 68,000 tokens/s, ZeRO-3 74 and 68,000, offloaded 56 and 41,000.
from config.train_llama2_7b import *
out_dir = 'out-llama3-8b'
n_kv_head = 8
n_hidden = 14336
rope_theta = 500000.0
block_size = 8192
batch_size = 1
gradient_accumulation_steps = 64  # 64 * 1 * 8192 = 524,288 tokens per step
