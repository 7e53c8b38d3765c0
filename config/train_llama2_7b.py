# The shape of Llama 2 7B (Touvron et al., arXiv:2307.09288): 6.7B parameters. Val loss: not measured.
#   ./launch_fsdp.sh 8 config/train_llama2_7b.py    or ./launch_deepspeed_zero3.sh, ./launch_deepspeed_zero3_offload.sh
# python -m tools.plan config/train_llama2_7b.py --vocab_size=32000 --device=H100 --gpus=8
# Predicted for 8 H100: FSDP2 63 GB each and 86,000 tokens/s, ZeRO-3 65 and 86,000, offloaded 50 and 50,000.
out_dir = 'out-llama2-7b'
dataset = 'mine'  # python data/text/prepare.py --name=mine --tokenizer=FOLDER --input ...
norm = 'rmsnorm'
mlp = 'swiglu'
tied = False
n_layer = 32
n_head = 32
n_embd = 4096
n_hidden = 11008
rope_theta = 10000.0
block_size = 4096
batch_size = 2
gradient_accumulation_steps = 64  # 64 * 2 * 4096 = 524,288 tokens per step
learning_rate = 3e-4
min_lr = 3e-5
log_interval = 10
