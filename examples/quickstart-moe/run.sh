#!/usr/bin/env bash
# As examples/quickstart, with eight experts in every layer of the model, two for each token: the trainer sends tokens where
# vLLM sent them.
#
#   bash examples/quickstart-moe/run.sh [key.path=value ...]     e.g.  round.routing_replay=off run.directory=runs/moe-off
set -euo pipefail

case "${1:-}" in
    -h | --help) sed -n '2,5s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
esac
export MODEL="${MODEL:-runs/quickstart-moe-model}" MODEL_OPTIONS="--experts 8"
exec bash "$(dirname "${BASH_SOURCE[0]}")/../quickstart/run.sh" \
    run.directory=runs/quickstart-moe run.rounds=12 optimizer.decay_steps=192 \
    round.routing_replay=rollout objective.balance_coefficient=0.01 "$@"
