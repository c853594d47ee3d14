#!/usr/bin/env bash
set -euo pipefail
NODES=1
SUMMARY="PMPO on DeepSeek-R1-Distill-Qwen-7B in the paper's setting: one node of 8 GPUs of 80 GB."
source "$(dirname "${BASH_SOURCE[0]}")/../common/launch.sh"
launch examples/deepseek-r1-distill-qwen-7b/config.yaml "$@"
