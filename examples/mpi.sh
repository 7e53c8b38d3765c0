#!/usr/bin/env bash
# mpirun starts this once on every node, and it starts the node's ranks:
#
#   mpirun -np 4 --map-by ppr:1:node --hostfile hosts -x PATH -x NCCL_SOCKET_IFNAME \
#       examples/mpi.sh worker-1 8 train_deepspeed.py config/train_gpt2_deepspeed_zero2.py --resume=auto
#
# The first argument is the first node's name or address. MPI only starts processes: what the ranks say to each other
# goes through NCCL. Open MPI, MPICH and Intel MPI tell a process its number by different names.
set -euo pipefail
cd "$(dirname "$0")/.."
nodes=${OMPI_COMM_WORLD_SIZE:-${PMI_SIZE:?"start this by mpirun"}}
node=${OMPI_COMM_WORLD_RANK:-$PMI_RANK}
first=${1:?"write: examples/mpi.sh FIRST_NODE RANKS_A_NODE SCRIPT [ARGUMENTS]"}
unset OMPI_COMM_WORLD_LOCAL_RANK # of this script, 0: DeepSpeed would take it for each rank's own
exec python launch.py --nnodes="$nodes" --node_rank="$node" \
    --master_addr="$first" --master_port="${MASTER_PORT:-29500}" "${@:2}"
