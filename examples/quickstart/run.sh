#!/usr/bin/env bash
# Makes the environment and a tiny warm-started model, then trains it with PMPO on this machine's CPU.
#
#   bash examples/quickstart/run.sh [key.path=value ...]     e.g.  "objective={preset: grpo}" run.directory=runs/grpo
#
# The environment and the model are made once; a second run goes on where the first stopped.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../tools/environment.sh"

case "${1:-}" in
    -h | --help) sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
esac
prepare_environment
cd "$PROJECT_ROOT"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc)}" TOKENIZERS_PARALLELISM=false

MODEL="${MODEL:-runs/quickstart-model}"
# shellcheck disable=SC2086  # several words
[ -f "$MODEL/config.json" ] || "$PYTHON" tools/make_tiny_model.py --out "$MODEL" ${MODEL_OPTIONS:-}
"$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "${NPROC_PER_NODE:-1}" \
    -m pmpo_megatron.commands.train --config examples/quickstart/config.yaml model.path="$MODEL" "$@"
