#!/usr/bin/env bash
# Train with DeepSpeed ZeRO-2: optimizer states and gradients are partitioned.
source "$(dirname "$0")/launch/train.sh" zero2 "$@"
