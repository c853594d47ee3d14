#!/usr/bin/env bash
#SBATCH --job-name=pmpo-qwen3-30b-a3b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@1200
#SBATCH --output=%x-%j.log
# From the project's root:  sbatch examples/qwen3-30b-a3b/slurm.sh [section.key=value ...]                   8 GPUs of 141 GB
#                           sbatch --nodes=2 examples/qwen3-30b-a3b/slurm.sh 16 [section.key=value ...]      16 GPUs of 80 GB
# vLLM runs on the GPUs that rollout.nodes, engines and tensor_parallel say; see examples/common/slurm.sh.
set -euo pipefail
source examples/common/slurm.sh
run_recipe examples/qwen3-30b-a3b/launch.sh "$@"
