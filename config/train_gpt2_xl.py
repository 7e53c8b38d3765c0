# GPT-2 xl, 1558M parameters, on OpenWebText; the learning rate is the GPT-3 paper's for this size (table 2.1).
#
#   python data/openwebtext/prepare.py
#   ./launch_traditional_ddp.sh 8 config/train_gpt2_xl.py
#
# OpenAI's weights of this size reach val loss 2.54 there (nanoGPT's README). Where memory is short, lower batch_size
# and raise gradient_accumulation_steps as much, so that a step keeps its 491,520 tokens.

out_dir = 'out-gpt2-xl'
wandb_run_name = 'gpt2-xl'

dataset = 'openwebtext'
gradient_accumulation_steps = 240
batch_size = 2
block_size = 1024  # 240 * 2 * 1024 = 491,520 tokens per step

n_layer = 48
n_head = 25
n_embd = 1600
activation_checkpointing = True

learning_rate = 2e-4
min_lr = 2e-5
max_iters = 600000
lr_decay_iters = 600000
warmup_iters = 2000
weight_decay = 1e-1

eval_interval = 1000
eval_iters = 200
log_interval = 10
