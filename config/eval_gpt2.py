# Evaluate OpenAI's GPT-2, 124M parameters, on OpenWebText. nanoGPT reports train loss 3.11, val loss 3.12 (its README).
#   python data/openwebtext/prepare.py
#   python train.py config/eval_gpt2.py
batch_size = 8
eval_iters = 500
eval_only = True
init_from = 'gpt2'
