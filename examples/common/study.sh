# Sourced by the run.sh of a study: runs the study.yaml beside it with tools/study.py, in the project's environment.
# start_model, if set before, is the model that all runs start from, and what tools/make_tiny_model.py makes it with.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../tools/environment.sh"

study="$(basename "$(cd "$(dirname "${BASH_SOURCE[1]}")" && pwd)")" out=()
case " $* " in
    *" -h "* | *" --help "*) sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[1]}"; exit 0 ;;
    *" --out "* | *" --out="*) ;;
    *) out=(--out "runs/$study") ;;
esac
prepare_environment
cd "$PROJECT_ROOT"
[ -n "${start_model[*]:-}" ] || start_model=(runs/quickstart-model)
[ -f "${start_model[0]}/config.json" ] || "$PYTHON" tools/make_tiny_model.py --out "${start_model[@]}"
exec "$PYTHON" tools/study.py "examples/$study/study.yaml" "$@" "${out[@]}"
