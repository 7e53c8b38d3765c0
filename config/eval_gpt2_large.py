# Evaluate OpenAI's GPT-2 large, 774M parameters, on OpenWebText. nanoGPT reports train loss 2.66, val loss 2.67.
#   python train.py config/eval_gpt2_large.py
from config.eval_gpt2 import *
init_from = 'gpt2-large'
