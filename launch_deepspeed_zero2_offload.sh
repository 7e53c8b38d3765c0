#!/usr/bin/env bash
# Train with DeepSpeed ZeRO-2: optimizer states and gradients are partitioned, the optimizer runs on the CPU.
source "$(dirname "$0")/launch/train.sh" zero2_offload "$@"
