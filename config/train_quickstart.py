# The model of ./launch_quickstart.sh: a small GPT on the bytes of Python's documentation.
#   python data/python_docs/prepare.py
#   ./launch_traditional_ddp.sh config/train_quickstart.py
# Val loss falls from 5.5 to about 1.36 nats per byte, in two to five minutes on 2 CPU cores.
out_dir = 'out-quickstart'
dataset = 'python_docs'
gradient_accumulation_steps = 8  # over all ranks: 1, 2, 4 and 8 ranks train the same model
batch_size = 4
block_size = 64
n_layer = 4
n_head = 4
n_embd = 128
learning_rate = 8e-3
min_lr = 4e-4
max_iters = 1200
lr_decay_iters = 1200
warmup_iters = 75
beta2 = 0.99
eval_interval = 150
eval_iters = 40
log_interval = 10
compile = False  # compiling would take as long as training
