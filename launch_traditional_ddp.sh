#!/usr/bin/env bash
# Train with DDP: every rank has a full copy of the model.
source "$(dirname "$0")/launch/train.sh" ddp "$@"
