#!/usr/bin/env bash
# Train with DeepSpeed ZeRO-1: optimizer states are partitioned.
source "$(dirname "$0")/launch/train.sh" zero1 "$@"
