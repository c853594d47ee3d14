#!/usr/bin/env bash
set -euo pipefail
NODES=4
SUMMARY="PMPO on Qwen2.5-32B: 4 nodes of 8 GPUs of 80 GB."
source "$(dirname "${BASH_SOURCE[0]}")/../common/launch.sh"
launch examples/qwen2.5-32b/config.yaml "$@"
