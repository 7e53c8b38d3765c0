#!/usr/bin/env bash
# ./launch_deepspeed_zero3_offload.sh [N] [config/x.py ...] [--key=value ...]
#
# Trains with DeepSpeed's ZeRO-3: all of the model state partitioned, and kept in the CPU's memory. N ranks on
# this machine; without N one for every GPU, or 2 CPU ranks. Without a config file:
# config/train_gpt2_deepspeed_zero3_offload.py. Keys: python train_deepspeed.py --help

# shellcheck source=launch_common.sh
source "$(dirname "$0")/launch_common.sh"
launch_deepspeed zero3_offload "$@"
