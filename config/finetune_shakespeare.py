# Fine-tune OpenAI's GPT-2 on Tiny Shakespeare.
#   python data/shakespeare/prepare.py
#   python train.py config/finetune_shakespeare.py                        gpt2-xl, on a GPU with 40 GB
#   python train.py config/finetune_shakespeare.py --init_from=gpt2       124M, on any machine
#   ./launch_deepspeed_zero3.sh 8 config/finetune_shakespeare.py          gpt2-xl, partitioned over smaller GPUs
# Without a network, set --init_from to a folder with the weights (config.json, model.safetensors).
out_dir = 'out-shakespeare'
init_from = 'gpt2-xl'
dataset = 'shakespeare'
gradient_accumulation_steps = 32
batch_size = 1
block_size = 1024  # 32,768 tokens per step: 9 steps per epoch
activation_checkpointing = True
learning_rate = 3e-5
decay_lr = False
max_iters = 20
eval_interval = 5
eval_iters = 40
always_save_checkpoint = False
