#!/usr/bin/env bash
# A training job on this machine's GPUs, or on several machines, under torchrun.
# Usage: train_torchrun.sh CONFIG [NUM_MACHINES MACHINE_RANK MAIN_ADDRESS]
# One machine needs no torchrun: `megatron-cpt train CONFIG --nproc 8` does the same.
set -euo pipefail
config=$1 machines=${2:-1} rank=${3:-0} address=${4:-127.0.0.1}
export CUDA_DEVICE_MAX_CONNECTIONS=1  # tensor-parallel communication overlaps only when it is launched in order

exec torchrun --nnodes "$machines" --node-rank "$rank" --nproc-per-node "${GPUS_PER_NODE:-8}" \
  --master-addr "$address" --master-port "${MASTER_PORT:-29500}" \
  -m megatron_cpt.cli.main train "$config"
