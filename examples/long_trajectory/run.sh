#!/usr/bin/env bash
# Trains a few rounds at one trajectory length after another and tabulates p, ESS and clip fraction against length.
#
#   bash examples/long_trajectory/run.sh [section.key=value ...]
#
# LENGTHS="64 256 1024 4096"   response tokens of each run
# MODEL=DIR                    a real model (default: a tiny one of random weights, made here)
# NPROC_PER_NODE=1             processes; e.g. 2 with parallel.context=2
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../tools/environment.sh"

case "${1:-}" in
    -h | --help) sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
esac
prepare_environment
cd "$PROJECT_ROOT"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc)}" TOKENIZERS_PARALLELISM=false PYTHONPATH="$PROJECT_ROOT"
lengths="${LENGTHS:-64 256 1024 4096}" model="${MODEL:-runs/long-trajectory-model}"
longest="$(tr ' ' '\n' <<<"$lengths" | sort -n | tail -n 1)"
[ -f "$model/config.json" ] || "$PYTHON" tools/make_tiny_model.py --steps 0 --endless --positions $((longest + 64)) --out "$model"
for length in $lengths; do
    echo "== $length tokens"
    "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "${NPROC_PER_NODE:-1}" -m pmpo_megatron.commands.train \
        --config examples/long_trajectory/config.yaml model.path="$model" run.directory="runs/long_trajectory/$length" \
        sampling.max_tokens="$length" "$@"
done
exec "$PYTHON" examples/long_trajectory/table.py runs/long_trajectory --out runs/long_trajectory/lengths.svg
