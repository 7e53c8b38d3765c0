#!/usr/bin/env bash
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
# In the repository, with out_dir on a shared disk: sbatch docs/slurm.sh [ARGUMENTS OF train_deepspeed.py]
# Five minutes before the time limit Slurm sends SIGUSR1 to this script, which forwards it: all ranks save at the same
# step and exit with status 75, and the job is requeued.
set -uo pipefail
master=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))
# shellcheck disable=SC2016  # each node expands its own $SLURM_NODEID
srun --kill-on-bad-exit=0 bash -c '
    exec python -m launch.ranks --nnodes="$SLURM_NNODES" --node_rank="$SLURM_NODEID" --master_addr="$0" --master_port="$1" \
        "${@:2}"' "$master" "$port" "${SLURM_GPUS_ON_NODE:-8}" train_deepspeed.py \
    config/train_gpt2_deepspeed_zero2.py --resume=auto "$@" &
run=$!
trap 'kill -USR1 "$run"' USR1 # srun forwards it to launch.ranks on every node
trap 'kill -TERM "$run"' TERM
wait "$run"; status=$?
while kill -0 "$run" 2>/dev/null; do wait "$run"; status=$?; done # a signal interrupted the wait; the run goes on
case $status in
    75 | 76 | 77) scontrol requeue "$SLURM_JOB_ID" ;; # stopped on request, hung, a node was lost
esac
exit "$status"
