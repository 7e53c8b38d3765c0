#!/usr/bin/env bash
# ./launch_traditional_ddp.sh [N] [config/x.py ...] [--key=value ...]
#
# Trains with DDP: N ranks on this machine, each with the whole model on a GPU of its own. Without N: one rank for
# every GPU, or 2 CPU ranks. Without a config file: config/train_gpt2.py. Keys: python train.py --help

# shellcheck source=launch_common.sh
source "$(dirname "$0")/launch_common.sh"
usage "$@"

environment requirements.txt
launch train.py config/train_gpt2.py "$@"
