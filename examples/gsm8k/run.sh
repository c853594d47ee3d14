#!/usr/bin/env bash
# PMPO on GSM8K or on a file of your own problems.
#
#   bash examples/gsm8k/run.sh --model DIR [--data FILE] [section.key=value ...]     a real model, on this machine's GPUs
#   bash examples/gsm8k/run.sh --smoke [--data FILE] [section.key=value ...]         two rounds of a tiny model on CPU
#
# --data FILE  JSON lines with "problem" and "answer" (default: openai/gsm8k from Hugging Face; --smoke: generated problems)
# GPUS=N       processes, one on each GPU (default: 8)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../tools/environment.sh"

smoke="" model="" data="" overrides=()
while [ $# -gt 0 ]; do
    case "$1" in
        -h | --help) sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
        --smoke) smoke=1; shift ;;
        --model) model="${2:?--model needs a directory}"; shift 2 ;;
        --data) data="$(realpath -- "${2:?--data needs a file}")"; shift 2 ;;
        *=*) overrides+=("$1"); shift ;;
        *) fail "unknown argument $1; see --help" ;;
    esac
done
[ -z "$data" ] || [ -f "$data" ] || fail "--data $data: no such file"
[ -n "$smoke$model" ] || fail "--model DIR is needed, or --smoke; see --help"

settings=()
own_file=(subset=null problem_field=problem answer_after=null)
[ -z "$data" ] || settings+=("data.source=$data" "${own_file[@]/#/data.}")
if [ -n "$smoke" ]; then
    prepare_environment
    cd "$PROJECT_ROOT"
    [ -f runs/quickstart-model/config.json ] || "$PYTHON" tools/make_tiny_model.py --out runs/quickstart-model
    [ -n "$data" ] || settings+=("data.source=arithmetic" "${own_file[@]/#/data.}")
    # The tiny model has one token for each character and 256 positions: it sees short problems only, and solves none.
    settings+=(run.device=auto 'sampling.stop_token_ids=[]' model.path=runs/quickstart-model run.directory=runs/gsm8k-smoke run.rounds=2 data.template=plain
        data.max_prompt_tokens=200 sampling.max_tokens=40 rollout.max_model_len=256 rollout.kv_cache_gib=0.2
        batch.prompts_per_round=16 batch.steps_per_round=2 batch.max_tokens_per_micro_batch=4096 rewards.workers=2
        evaluation.data=null)
    launcher=("$PYTHON" -m pmpo_megatron.commands.train)
else
    cd "$PROJECT_ROOT"
    PYTHON="${PYTHON:-python}"
    [ -f "$model/config.json" ] || fail "--model $model: no Hugging Face checkpoint there (no config.json)"
    settings+=("model.path=$model")
    [ -z "$data" ] || settings+=(evaluation.data=null)
    launcher=("$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "${GPUS:-8}" -m pmpo_megatron.commands.train)
fi
exec "${launcher[@]}" --config examples/gsm8k/config.yaml "${settings[@]}" "${overrides[@]}"
