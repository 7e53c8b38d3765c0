#!/usr/bin/env bash
# Train with DeepSpeed ZeRO-0: nothing is partitioned, as in DDP.
source "$(dirname "$0")/launch/train.sh" zero0 "$@"
