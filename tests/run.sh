#!/usr/bin/env bash
# Installs what the tests need into a virtual environment of the project and runs them.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../tools/environment.sh"

usage() {
    cat <<'TEXT'
usage: tests/run.sh [--python PATH] [--help] [-- PYTEST_ARGUMENTS...]

  --python PATH   another interpreter (3.11 to 3.13); it gets its own environment, .venv-pyX.Y
  -- ...          arguments for pytest, e.g.  -- -m slow   -- tests/unit -x   -- -m "" (everything)

The tests of the sandbox need bubblewrap (apt-get install bubblewrap) and skip without it.
Without arguments: style and types, then the default suite (everything that is not marked slow).
TEXT
}

options=(--dev)
while [ $# -gt 0 ]; do
    case "$1" in
        --python) [ $# -ge 2 ] || fail "--python needs a path"; options+=(--python "$2"); shift 2 ;;
        -h | --help) usage; exit 0 ;;
        --) shift; break ;;
        *) usage >&2; fail "unknown argument $1 (pytest's arguments come after --)" ;;
    esac
done

prepare_environment "${options[@]}"
cd "$PROJECT_ROOT"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
exec "$PYTHON" -m pytest "$@"
