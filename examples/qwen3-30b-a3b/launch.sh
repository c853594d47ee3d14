#!/usr/bin/env bash
# First argument: 8 (default) or 16 GPUs.
set -euo pipefail
GPUS=8
case "${1:-}" in 8 | 16) GPUS="$1"; shift ;; esac
case "$GPUS" in 8) NODES=1 HARDWARE="${HARDWARE:-h200-141gb}" ;; 16) NODES=2 ;; esac
SUMMARY="PMPO on Qwen3-30B-A3B, a mixture of 128 experts, spread over the GPUs of a node.
First argument: 8 (default; one node of 8 GPUs of 141 GB) or 16 (2 nodes of 8 GPUs of 80 GB). This is $GPUS."
source "$(dirname "${BASH_SOURCE[0]}")/../common/launch.sh"
launch "examples/qwen3-30b-a3b/config-$GPUS.yaml" "$@"
