#!/usr/bin/env bash
# Train with DeepSpeed ZeRO-3: optimizer states, gradients and parameters are partitioned.
source "$(dirname "$0")/launch/train.sh" zero3 "$@"
