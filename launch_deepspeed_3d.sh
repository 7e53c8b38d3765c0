#!/usr/bin/env bash
# Train with DeepSpeed: 2 pipeline stages x 2 tensor-parallel ranks x data parallelism over the rest, with ZeRO-1.
source "$(dirname "$0")/launch/train.sh" 3d "$@"
