#!/usr/bin/env bash
# Train with DeepSpeed ZeRO-3 over several nodes; parameters are gathered for backward within a node (hpZ).
source "$(dirname "$0")/launch/train.sh" zero3_hpz "$@"
