# The shape of Qwen3 0.6B (arXiv:2505.09388): 0.6B parameters. Val loss: not measured.
#   ./launch_fsdp.sh 8 config/train_qwen3_0.6b.py    or ./launch_deepspeed_zero3.sh, ./launch_deepspeed_zero3_offload.sh
# python -m tools.plan config/train_qwen3_0.6b.py --vocab_size=151936 --device=H100 --gpus=8
# Predicted for 8 H100: FSDP2 33 GB each and 616,000 tokens/s, ZeRO-3 34 and 616,000, offloaded 33 and 276,000.
from config.train_llama2_7b import *
out_dir = 'out-qwen3-0.6b'
tied = True
n_layer = 28
n_head = 16
n_kv_head = 8
head_size = 128
n_embd = 1024
n_hidden = 3072
qk_norm = True
rope_theta = 1000000.0
batch_size = 8
gradient_accumulation_steps = 4  # 4 * 8 * 4096 = 131,072 tokens per step
learning_rate = 6e-4
min_lr = 6e-5
