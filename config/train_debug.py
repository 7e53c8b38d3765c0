# A tiny model for trying out a change: training, evaluation and checkpoints in under a minute on a CPU.
#   python data/python_docs/prepare.py
#   python train.py config/train_debug.py
# Val loss falls from 5.6 to about 2.6. Data and batches are those of config/train_quickstart.py.
from config.train_quickstart import *
out_dir = 'out-debug'
gradient_accumulation_steps = 4  # divisible by 1, 2 and 4 ranks
n_layer = 2
n_head = 2
n_embd = 64
learning_rate = 1e-3  # stable: at 2e-3, rounding differences between strategies grow a hundredfold
min_lr = 1e-4
max_iters = 200
lr_decay_iters = 200
warmup_iters = 20
eval_interval = 50
eval_iters = 10
device = 'cpu'
