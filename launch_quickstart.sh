#!/usr/bin/env bash
# From a fresh clone to a trained model and a page of text that it writes: install the packages, prepare a small data
# set from Python's documentation without a download, train with ZeRO-2 on every GPU (or N, or 2 CPU ranks), sample.
source "$(dirname "$0")/launch/common.sh"
usage "${1:-}" "[N] [--key=value ...]"

out_dir=$(printf '%s\n' --out_dir=out-quickstart "$@" | sed -n 's/^--out_dir=//p' | tail -1)
environment requirements.txt
[[ -e data/python_docs/meta.json ]] || "$python" data/python_docs/prepare.py

# In the background: a SIGTERM to this shell alone would otherwise leave the training running. Ctrl-C reaches both.
launch train_deepspeed.py config/train_quickstart.py "$@" &
trap 'kill -TERM $!; wait $! || true; exit 143' TERM
trap 'wait $! || true; exit 130' INT
wait $!

echo
"$python" sample.py --out_dir="$out_dir" --num_samples=1 --max_new_tokens=600 --temperature=0.6 --start="The " | fold -s
