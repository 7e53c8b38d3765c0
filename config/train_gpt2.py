# GPT-2 124M on OpenWebText. nanoGPT reports val loss 2.85 after 4 days on 8 A100 40 GB.
#   python data/openwebtext/prepare.py
#   ./launch_traditional_ddp.sh 8 config/train_gpt2.py
# The model, the learning rate and 600,000 steps (295B tokens) are the defaults, as in nanoGPT (train.py --help).
out_dir = 'out-gpt2'
gradient_accumulation_steps = 6 * 8  # over all ranks: 1, 2, 3, 4, 6, 8, 12, 16, 24 or 48
batch_size = 10
block_size = 1024  # 48 * 10 * 1024 = 491,520 tokens per step, as nanoGPT's 40 * 12 * 1024
eval_interval = 1000
log_interval = 10
