#!/usr/bin/env bash
# Run by mpirun once per node, it starts the ranks of the node:
#   mpirun -np 4 --map-by ppr:1:node --hostfile hosts -x PATH -x NCCL_SOCKET_IFNAME \
#       docs/mpi.sh worker-1 8 train_deepspeed.py config/train_gpt2_deepspeed_zero2.py --resume=auto
set -euo pipefail
cd "$(dirname "$0")/.."
nodes=${OMPI_COMM_WORLD_SIZE:-${PMI_SIZE:?"run this with mpirun"}} # Open MPI; MPICH and Intel MPI
node=${OMPI_COMM_WORLD_RANK:-$PMI_RANK}
first=${1:?"usage: docs/mpi.sh FIRST_NODE RANKS_PER_NODE SCRIPT [ARGUMENTS]"}
unset OMPI_COMM_WORLD_LOCAL_RANK # DeepSpeed would use it, 0, as the local rank of every rank
exec python -m launch.ranks --nnodes="$nodes" --node_rank="$node" \
    --master_addr="$first" --master_port="${MASTER_PORT:-29500}" "${@:2}"
