#!/usr/bin/env bash
set -euo pipefail
NODES=1
SUMMARY="PMPO on Qwen2.5-Coder-7B, mathematics and programs together: one node of 8 GPUs of 80 GB."
source "$(dirname "${BASH_SOURCE[0]}")/../common/launch.sh"
launch examples/qwen2.5-coder-7b/config.yaml "$@"
