# GPT-2 medium, 350M parameters, on OpenWebText; the learning rate is the GPT-3 paper's for this size (table 2.1).
#
#   python data/openwebtext/prepare.py
#   ./launch_traditional_ddp.sh 8 config/train_gpt2_medium.py
#
# OpenAI's weights of this size reach val loss 2.84 there (nanoGPT's README). Where memory is short, lower batch_size
# and raise gradient_accumulation_steps as much, so that a step keeps its 491,520 tokens.

out_dir = 'out-gpt2-medium'
wandb_run_name = 'gpt2-medium'

dataset = 'openwebtext'
gradient_accumulation_steps = 80
batch_size = 6
block_size = 1024  # 80 * 6 * 1024 = 491,520 tokens per step

n_layer = 24
n_head = 16
n_embd = 1024
activation_checkpointing = False

learning_rate = 3e-4
min_lr = 3e-5
max_iters = 600000
lr_decay_iters = 600000
warmup_iters = 2000
weight_decay = 1e-1

eval_interval = 1000
eval_iters = 200
log_interval = 10
