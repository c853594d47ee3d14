#!/usr/bin/env bash
# Trains a tiny model to use a calculator, on this machine's CPU (calculator.py beside this file is the whole of it).
#
#   bash examples/tools/run.sh [key.path=value ...]     e.g.  rollout.sharing=queue run.directory=runs/tools-queue
#
# The environment and the model are made once; a second run goes on where the first stopped.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../tools/environment.sh"

case "${1:-}" in
    -h | --help) sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
esac
prepare_environment
cd "$PROJECT_ROOT"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc)}" TOKENIZERS_PARALLELISM=false PYTHONPATH="$PWD/examples/tools"

[ -f runs/tools-model/config.json ] || "$PYTHON" tools/make_tiny_model.py --out runs/tools-model --steps 1000 --slip-skew 2 --call-rate 0.25
exec "$PYTHON" -m pmpo_megatron.commands.train --config examples/tools/config.yaml "$@"
