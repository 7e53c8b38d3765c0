#!/usr/bin/env bash
# ./launch_quickstart.sh [N] [--key=value ...]
#
# From a fresh clone to a trained model and a page of what it writes: the packages, a small data set of Python
# source that needs no download, training with ZeRO-2 on every GPU (or N, or 2 CPU ranks), a sample.

# shellcheck source=launch_common.sh
source "$(dirname "$0")/launch_common.sh"
usage "$@"

out_dir=out-quickstart
for argument; do
    if [[ $argument == --out_dir=* ]]; then out_dir=${argument#*=}; fi
done

environment requirements.txt
[[ -e data/python_stdlib/meta.json ]] || "$python" data/python_stdlib/prepare.py

# In the background, as a SIGTERM to this shell alone would otherwise leave the training behind. A Ctrl-C reaches
# both. After a stop there is nothing to show yet.
launch train_deepspeed.py config/train_quickstart.py "$@" &
trap 'stopped=143; kill -TERM $!' TERM
trap 'stopped=130' INT
status=0
wait $! || status=$?
while kill -0 $! 2>/dev/null; do wait $! || true; done
((${stopped:=$status} == 0)) || exit "$stopped"

echo
"$python" sample.py --out_dir="$out_dir" --num_samples=1 --max_new_tokens=400 --start="def "
echo
echo "The run is in $out_dir, its loss curve in $out_dir/loss.png."
