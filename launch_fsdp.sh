#!/usr/bin/env bash
# Train with PyTorch FSDP2: parameters, gradients and optimizer states are sharded.
source "$(dirname "$0")/launch/train.sh" fsdp "$@"
