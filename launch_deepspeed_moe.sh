#!/usr/bin/env bash
# Train a mixture of experts with DeepSpeed: each expert on every second rank, with ZeRO-1.
source "$(dirname "$0")/launch/train.sh" moe "$@"
