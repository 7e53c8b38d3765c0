# A character-level GPT on Tiny Shakespeare.
#   python data/shakespeare_char/prepare.py
#   python train.py config/train_shakespeare_char.py
# Val loss reaches about 1.47 after 2,000 steps; after that it overfits. README.md has a smaller model for a CPU.
out_dir = 'out-shakespeare-char'
dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2
learning_rate = 1e-3
min_lr = 1e-4
max_iters = 5000
lr_decay_iters = 5000
warmup_iters = 100
beta2 = 0.99  # because a step has few tokens
eval_interval = 250
log_interval = 10
always_save_checkpoint = False  # keep only the best
