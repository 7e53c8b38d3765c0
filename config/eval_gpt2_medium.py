# Evaluate OpenAI's GPT-2 medium, 350M parameters, on OpenWebText. nanoGPT reports train loss 2.85, val loss 2.84.
#   python train.py config/eval_gpt2_medium.py
from config.eval_gpt2 import *
init_from = 'gpt2-medium'
