# Everything once, in under a minute on a CPU: evaluation, checkpoints, resume. For trying out a change.
#
#   python data/python_stdlib/prepare.py
#   python train.py config/train_debug.py
#
# Expect val loss 5.6 -> about 2.6.

out_dir = 'out-debug'
dataset = 'python_stdlib'

gradient_accumulation_steps = 4  # divisible by 1, 2 and 4 ranks
batch_size = 4
block_size = 64

n_layer = 2
n_head = 2
n_embd = 64

learning_rate = 1e-2
min_lr = 1e-3
max_iters = 200
lr_decay_iters = 200
warmup_iters = 20
beta2 = 0.99

eval_interval = 50
eval_iters = 10
log_interval = 10

device = 'cpu'
compile = False
