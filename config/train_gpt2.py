# GPT-2 124M on OpenWebText.
#
#   python data/openwebtext/prepare.py
#   ./launch_traditional_ddp.sh 8 config/train_gpt2.py
#
# nanoGPT's README reports val loss about 2.85 for this recipe, after 4 days on 8 A100 of 40 GB.

out_dir = 'out-gpt2'
wandb_log = False  # True: needs `wandb login` once
wandb_run_name = 'gpt2-124M'

dataset = 'openwebtext'
gradient_accumulation_steps = 5 * 8  # of all ranks together
batch_size = 12
block_size = 1024                    # 40 * 12 * 1024 = 491,520 tokens per step

n_layer = 12
n_head = 12
n_embd = 768

learning_rate = 6e-4
min_lr = 6e-5
max_iters = 600000  # 295B tokens
lr_decay_iters = 600000
warmup_iters = 2000
weight_decay = 1e-1

eval_interval = 1000
eval_iters = 200
log_interval = 10
