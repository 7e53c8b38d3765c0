#!/usr/bin/env bash
# Train with DDP: every rank has a full copy of the model.
source "$(dirname "$0")/launch/common.sh"
setting=--strategy=ddp launch_training train.py config/train_gpt2.py "$@"
