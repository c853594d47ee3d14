# Sourced by examples/quickstart/run.sh and tests/run.sh: makes, or reuses, the project's virtual environment.
#
#   prepare_environment [--dev] [--python PATH]      then $PYTHON is the environment's interpreter
#
# The environment is .venv at the project's root (.venv-pyX.Y for an interpreter chosen with --python). A stamp over the
# pinned requirements and the project's metadata makes a second run reuse it, and a change of either install again. Two
# runs at once wait for each other.

PROJECT_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
NEEDED_GIB=6

fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

choose_python() {
    local candidate
    for candidate in ${1:+"$1"} ${1:-python3 python3.13 python3.12 python3.11}; do
        command -v "$candidate" >/dev/null 2>&1 || continue
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

prepare_environment() {
    local requested="" dev="" python venv stamp wanted files
    while [ $# -gt 0 ]; do
        case "$1" in
            --dev) dev=1; shift ;;
            --python) requested="${2:?--python needs a path}"; shift 2 ;;
            *) fail "prepare_environment: unknown option $1" ;;
        esac
    done
    python="$(choose_python "$requested")" ||
        fail "Python 3.11, 3.12 or 3.13 is needed; ${requested:-python3} is $({ "${requested:-python3}" -V || echo absent; } 2>/dev/null | head -n 1). Name one with --python PATH."
    venv="$PROJECT_ROOT/.venv"
    [ -z "$requested" ] || venv="$PROJECT_ROOT/.venv-py$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
    files="$PROJECT_ROOT/requirements/cpu.txt${dev:+ $PROJECT_ROOT/requirements/dev.txt}"
    PYTHON="$venv/bin/python"

    exec 9>"$venv.lock" || fail "cannot write to $PROJECT_ROOT"
    flock -n 9 || { echo "Waiting for another run that prepares $venv ..."; flock 9; }
    for part in $files; do
        stamp="$venv/.installed-$(basename "$part" .txt)"
        wanted="$(cksum "$part" "$PROJECT_ROOT"/{setup.py,pyproject.toml} | cut -d' ' -f1,2 | tr '\n' ' ')$("$python" -V)"
        if [ -x "$PYTHON" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then continue; fi
        install_requirements "$python" "$venv" "$part"
        printf '%s' "$wanted" >"$stamp"
    done
    exec 9>&-
}

install_requirements() {
    local python="$1" venv="$2" requirements="$3" free_gib
    local pip=("$venv/bin/python" -m pip --disable-pip-version-check --quiet)
    if [ ! -x "$venv/bin/python" ]; then
        free_gib=$(($(df -Pk "$PROJECT_ROOT" | awk 'NR==2 {print $4}') / 1024 / 1024))
        [ "$free_gib" -ge "$NEEDED_GIB" ] ||
            fail "$PROJECT_ROOT has $free_gib GiB free; the environment needs $NEEDED_GIB GiB. Free some, or clone on a larger disk."
        echo "Making $venv ($("$python" -V)); this takes a few minutes and happens once ..."
        "$python" -m venv "$venv" || fail "$python cannot make virtual environments (on Debian: apt install python3-venv)"
    fi
    echo "Installing $(basename "$requirements") ..."
    "${pip[@]}" install --retries 1 --timeout 20 "pip==26.2" 2>"$venv/pip.log" ||
        fail "the package index cannot be reached (no network? proxy not set?); pip said: $(tail -n 2 "$venv/pip.log")"
    # torch with its own dependencies, so that a build for CUDA gets its libraries; all else exactly as pinned.
    "${pip[@]}" install "torch==2.13.0" 2>"$venv/pip.log" && "${pip[@]}" install --no-deps -r "$requirements" 2>"$venv/pip.log" &&
        "${pip[@]}" install --no-deps --no-build-isolation -e "$PROJECT_ROOT" 2>"$venv/pip.log" ||
        fail "installing $requirements failed; the whole log is $venv/pip.log; its end: $(grep -v WARNING "$venv/pip.log" | tail -n 5)"
}
