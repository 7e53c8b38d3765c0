# Fine-tune a Llama, Mistral, Qwen2.5, Qwen3 or SmolLM2 of Hugging Face on your own text.
#   python data/text/prepare.py --name=mine --tokenizer=MODEL --input notes/     MODEL: the folder of its files
#   python train.py config/finetune_hf.py --init_from=MODEL                      135M parameters: on any machine
#   ./launch_fsdp.sh 8 config/finetune_hf.py --init_from=MODEL                   no rank holds the whole model
#   ./launch_deepspeed_zero3.sh 8 config/finetune_hf.py --init_from=MODEL
#   python -m tools.convert out-finetune-hf finetuned --to=hf                    for transformers, with its tokenizer
# The loss it reaches depends on the text. With a network, --init_from may be a name on the hub; --tokenizer may not.
from config.finetune_shakespeare import *
out_dir = 'out-finetune-hf'
init_from = 'HuggingFaceTB/SmolLM2-135M'
dataset = 'mine'
learning_rate = 2e-5
max_iters = 100
eval_interval = 20
