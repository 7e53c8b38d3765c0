#!/usr/bin/env bash
#SBATCH --job-name=nanozero
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#
# sbatch examples/slurm.sh [ARGUMENTS OF train_deepspeed.py]
#
# Five minutes before the time is up, Slurm sends SIGUSR1 here: it is passed on, all ranks save at the same step and end
# with status 75, and the job is queued again. Submit it from the repository's folder; out_dir must be on a shared disk.

set -uo pipefail
gpus=${SLURM_GPUS_ON_NODE:-8}
master=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))

# shellcheck disable=SC2016  # $SLURM_NODEID is each node's own
srun --kill-on-bad-exit=0 bash -c '
    exec python launch.py --nnodes="$SLURM_NNODES" --node_rank="$SLURM_NODEID" --master_addr="$0" --master_port="$1" \
        "${@:2}"' "$master" "$port" "$gpus" train_deepspeed.py \
    config/train_gpt2_deepspeed_zero2.py --resume=auto "$@" &
run=$!
trap 'kill -USR1 "$run"' USR1 # srun passes it on to every launch.py
trap 'kill -TERM "$run"' TERM

wait "$run"
status=$?
while kill -0 "$run" 2>/dev/null; do # a signal ended the wait, not the run
    wait "$run"
    status=$?
done
case $status in
    75 | 76 | 77) scontrol requeue "$SLURM_JOB_ID" ;; # asked to stop; hung; a node was lost
esac
exit "$status"
