#!/usr/bin/env bash
# ./launch_fsdp.sh [N] [config/x.py ...] [--key=value ...]
#
# Trains with PyTorch's FSDP2: parameters, gradients and optimizer states sharded. N ranks on this machine; without N
# one for every GPU, or 2 CPU ranks. Without a config file: config/train_gpt2_fsdp.py. Keys: python train.py --help

# shellcheck source=launch_common.sh
source "$(dirname "$0")/launch_common.sh"
usage "$@"

environment requirements.txt
setting=--strategy=fsdp launch train.py config/train_gpt2_fsdp.py "$@"
