#!/usr/bin/env bash
# First argument: 32k (default) or 128k, the longest trajectory.
set -euo pipefail
LENGTH=32k
case "${1:-}" in 32k | 128k) LENGTH="$1"; shift ;; esac
case "$LENGTH" in 32k) NODES=1 ;; 128k) NODES=4 ;; esac
SUMMARY="PMPO on DeepSeek-R1-Distill-Qwen-7B with long trajectories, split over GPUs by context parallelism.
First argument: 32k (default; one node of 8 GPUs of 80 GB) or 128k (4 nodes). This is $LENGTH."
source "$(dirname "${BASH_SOURCE[0]}")/../common/launch.sh"
launch "examples/long_context/config-$LENGTH.yaml" "$@"
