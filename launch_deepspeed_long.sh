#!/usr/bin/env bash
# Train on long sequences with DeepSpeed: each on 2 ranks (Ulysses), with ZeRO-2.
source "$(dirname "$0")/launch/train.sh" long "$@"
