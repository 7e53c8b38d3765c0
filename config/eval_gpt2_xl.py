# Evaluate OpenAI's GPT-2 xl, 1558M parameters, on OpenWebText. nanoGPT reports train loss 2.56, val loss 2.54.
#   python train.py config/eval_gpt2_xl.py
from config.eval_gpt2 import *
init_from = 'gpt2-xl'
