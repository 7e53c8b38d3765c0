# A small GPT on the source code of Python's standard library, byte by byte: what ./launch_quickstart.sh trains.
#
#   python data/python_stdlib/prepare.py
#   ./launch_traditional_ddp.sh config/train_quickstart.py
#
# Expect val loss 5.4 -> about 1.6 nats per byte in about two minutes on 2 CPU cores.

out_dir = 'out-quickstart'
dataset = 'python_stdlib'

gradient_accumulation_steps = 8  # micro-steps of all ranks together: 1, 2, 4 and 8 ranks train the same model
batch_size = 4
block_size = 128

n_layer = 4
n_head = 4
n_embd = 128

learning_rate = 4e-3
min_lr = 4e-4
max_iters = 800
lr_decay_iters = 800
warmup_iters = 50
beta2 = 0.99

eval_interval = 100
eval_iters = 20
log_interval = 10

compile = False  # it would take as long as the training
