#!/usr/bin/env bash
# Train with DeepSpeed ZeRO-3: all of the model state is partitioned and kept on NVMe disks.
source "$(dirname "$0")/launch/train.sh" zero3_nvme "$@"
