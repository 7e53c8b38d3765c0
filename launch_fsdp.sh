#!/usr/bin/env bash
# Train with PyTorch FSDP2: parameters, gradients and optimizer states are sharded.
source "$(dirname "$0")/launch/common.sh"
setting=--strategy=fsdp launch_training train.py config/train_gpt2_fsdp.py "$@"
