#!/usr/bin/env bash
set -euo pipefail
NODES=16
HARDWARE="${HARDWARE:-h200-141gb}"
SUMMARY="PMPO on Qwen3-235B-A22B, a mixture of 128 experts: 16 nodes of 8 GPUs of 141 GB."
source "$(dirname "${BASH_SOURCE[0]}")/../common/launch.sh"
launch examples/qwen3-235b-a22b/config.yaml "$@"
