# The width, depth, data and budget of config/train_gpt2.py with what has replaced GPT-2's parts since: RMSNorm, RoPE,
# QK-norm, ReLU squared, a head of its own, and Muon for the matrices inside the blocks.
#   ./launch_traditional_ddp.sh 8 config/train_speedrun.py
#   ./launch_fsdp.sh 8 config/train_speedrun.py
# At 10M parameters it reaches GPT-2's loss with 0.14 to 0.16 of the tokens (results/speedrun). At 124M: not measured.
from config.train_gpt2 import *
out_dir = 'out-speedrun'
norm = 'rmsnorm'
mlp = 'relu2'
qk_norm = True
rope_theta = 10000.0
tied = False  # 39M parameters more with GPT-2's vocabulary, at the same FLOPs per token
optimizer = 'muon'
learning_rate = 2e-3  # of AdamW, for the embedding, the head and the norms
min_lr = 0.0
