#!/usr/bin/env bash
set -euo pipefail
NODES=16
SUMMARY="PMPO on Llama-3.3-70B-Instruct: 16 nodes of 8 GPUs of 80 GB."
source "$(dirname "${BASH_SOURCE[0]}")/../common/launch.sh"
launch examples/llama-3.3-70b/config.yaml "$@"
