# Sourced by the run.sh of a study: runs the study.yaml beside it with tools/study.py, in the project's environment.

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
[ -f runs/quickstart-model/config.json ] || "$PYTHON" tools/make_tiny_model.py --out runs/quickstart-model
exec "$PYTHON" tools/study.py "examples/$study/study.yaml" "$@" "${out[@]}"
