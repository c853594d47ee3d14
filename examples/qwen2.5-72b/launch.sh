#!/usr/bin/env bash
set -euo pipefail
NODES=16
SUMMARY="PMPO on Qwen2.5-72B: 16 nodes of 8 GPUs of 80 GB."
source "$(dirname "${BASH_SOURCE[0]}")/../common/launch.sh"
launch examples/qwen2.5-72b/config.yaml "$@"
