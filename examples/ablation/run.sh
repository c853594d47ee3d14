#!/usr/bin/env bash
# Runs objectives x seeds on the generated arithmetic task with equal budget, and makes one report with confidence bands.
#
#   bash examples/ablation/run.sh [--seeds N] [--rounds N] [--steps N] [--variants "pmpo grpo ..."] [--out DIR] [section.key=value ...]
#
# Default: 8 variants x 3 seeds, 25 rounds of 8 optimizer steps each (the paper's number: within a round the policy drifts,
# and only then do the objectives differ), less than an hour on 2 cores. What is finished is not run again, so an interrupted
# comparison goes on; more seeds can be added later. A variant is a preset, or NAME:section.key=value,section.key=value of
# its own: --variants "pmpo p-is-1:objective.rule=fixed,objective.p=1". The first is what the others are compared with.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../tools/environment.sh"

seeds=3 rounds=25 steps=8 out=runs/ablation overrides=()
variants="pmpo pmpo-linear:objective.rule=linear grpo dr_grpo dapo gmpo gspo holder"
while [ $# -gt 0 ]; do
    case "$1" in
        -h | --help) sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
        --seeds) seeds="${2:?--seeds needs a number}"; shift 2 ;;
        --rounds) rounds="${2:?--rounds needs a number}"; shift 2 ;;
        --steps) steps="${2:?--steps needs a number}"; shift 2 ;;
        --variants) variants="${2:?--variants needs names}"; shift 2 ;;
        --out) out="${2:?--out needs a directory}"; shift 2 ;;
        *=*) overrides+=("$1"); shift ;;
        *) fail "unknown argument $1; see --help" ;;
    esac
done
prepare_environment
cd "$PROJECT_ROOT"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc)}" TOKENIZERS_PARALLELISM=false
[ -f runs/quickstart-model/config.json ] || "$PYTHON" tools/make_tiny_model.py --out runs/quickstart-model

for seed in $(seq 1 "$seeds"); do
    for variant in $variants; do
        name="${variant%%:*}" settings=("objective.preset=$variant")
        if [ "$name" != "$variant" ]; then
            IFS=, read -ra settings <<<"${variant#*:}"
        fi
        echo "== $name, seed $seed of $seeds"
        "$PYTHON" -m pmpo_megatron.commands.train --config examples/quickstart/config.yaml run.directory="$out/$name/seed-$seed" \
            run.rounds="$rounds" run.seed="$seed" sampling.seed="$seed" evaluation.every_rounds=5 \
            batch.steps_per_round="$steps" optimizer.learning_rate=1.0e-4 optimizer.decay_steps=$((rounds * steps)) \
            checkpoint.every_rounds="$rounds" monitor.tensorboard=false monitor.report=false \
            monitor.progress=line "${settings[@]}" "${overrides[@]}"
    done
done
exec "$PYTHON" tools/compare_runs.py "$out" --reference "${variants%%[: ]*}"
