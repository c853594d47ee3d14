#!/usr/bin/env bash
#SBATCH --job-name=pmpo-long-context
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@1800
#SBATCH --output=%x-%j.log
# From the project's root:  sbatch examples/long_context/slurm.sh [section.key=value ...]                     32k tokens
#                           sbatch --nodes=4 examples/long_context/slurm.sh 128k [section.key=value ...]     128k tokens
# vLLM runs on the GPUs that rollout.nodes, engines and tensor_parallel say; see examples/common/slurm.sh.
set -euo pipefail
source examples/common/slurm.sh
run_recipe examples/long_context/launch.sh "$@"
