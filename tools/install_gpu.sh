#!/usr/bin/env bash
# Makes the environment of a machine with CUDA GPUs from the Python package index alone, and checks what it has.
#
#   bash tools/install_gpu.sh [--venv DIR] [--python PATH] [--without-transformer-engine | --check]
#
#   --venv DIR     where (default: .venv in the project's root); what is there already is completed
#   --python PATH  interpreter to make it with, 3.11 to 3.13 (default: python3)
#   --without-transformer-engine  do not compile it
#   --check        install nothing; say what the environment has
#
# Transformer Engine has no wheel for PyTorch on the index: it is compiled here, against the CUDA toolkit, cuDNN and NCCL that
# pip installs, with a C++ compiler of the system; MAX_JOBS limits the processes. Without it runs use the project's own layers
# (model.layers). Exit code: 0 everything is there, 1 something is missing: it is named.
set -euo pipefail
PROJECT_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
TRANSFORMER_ENGINE="transformer-engine[pytorch]==2.20.2"

fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

# Directories of the CUDA toolkit that pip installed with torch: $SITE/cu13 is the toolkit, the others have headers of their own.
export_toolkit() {
    local site
    site="$("$PYTHON" -c 'import site; print(site.getsitepackages()[0])')/nvidia"
    [ -f "$site/cudnn/include/cudnn.h" ] || fail "$site/cudnn/include/cudnn.h is missing: is this a CUDA build of torch?"
    export CUDA_HOME="${CUDA_HOME:-$site/cu13}" CUDNN_PATH="${CUDNN_PATH:-$site/cudnn}"
    export CPATH="$site/cudnn/include:$site/nccl/include${CPATH:+:$CPATH}"
    export LIBRARY_PATH="$site/cudnn/lib:$site/nccl/lib:$CUDA_HOME/lib${LIBRARY_PATH:+:$LIBRARY_PATH}"
    export PATH="$CUDA_HOME/bin:$PATH" NVTE_FRAMEWORK=pytorch
    command -v nvcc >/dev/null || fail "no nvcc in $CUDA_HOME/bin; set CUDA_HOME to a CUDA toolkit"
    command -v c++ >/dev/null || fail "no C++ compiler (on Debian and Ubuntu: apt install g++)"
}

install_packages() {
    [ -x "$PYTHON" ] || "$1" -m venv "$VENV" || fail "$1 cannot make virtual environments (on Debian: apt install python3-venv)"
    "$PYTHON" -m pip install --quiet -r "$PROJECT_ROOT/requirements/gpu.txt" || fail "requirements/gpu.txt could not be installed"
    "$PYTHON" -m pip install --quiet --no-deps --no-build-isolation -e "$PROJECT_ROOT" || fail "the project could not be installed"
}

compile_transformer_engine() {
    ! "$PYTHON" -c 'import importlib.metadata as m; m.version("transformer-engine-torch")' 2>/dev/null || return 0
    echo "Compiling Transformer Engine ..."
    # The compiler of the version whose libraries torch brought.
    "$PYTHON" -m pip install --quiet pybind11 ninja cmake setuptools wheel \
        "cuda-toolkit[nvcc,cccl]==$("$PYTHON" -c 'import importlib.metadata as m; print(m.version("cuda-toolkit"))')"
    export_toolkit
    "$PYTHON" -m pip install --no-build-isolation "$TRANSFORMER_ENGINE" >"$VENV/transformer_engine.log" 2>&1 ||
        echo "error: Transformer Engine was not compiled; the log is $VENV/transformer_engine.log; its end: $(tail -n 3 "$VENV/transformer_engine.log")" >&2
}

# One line for each part; 1 if one of them is missing.
check() {
    [ -x "$PYTHON" ] || fail "$PYTHON: no such interpreter; run this without --check first"
    "$PYTHON" - <<'PYTHON'
import ctypes, importlib, sys

def report(name, probe, otherwise):
    try:
        print(f"{name}: {probe()}")
        return True
    except Exception as error:
        print(f"{name}: MISSING ({str(error).splitlines()[0] if str(error) else type(error).__name__}); {otherwise}")
        return False

def version(module):
    return lambda: getattr(importlib.import_module(module), "__version__", "there")

def driver():
    ctypes.CDLL("libcuda.so.1")
    return "there"

def gpus():
    import torch
    if not torch.cuda.is_available():
        raise RuntimeError("PyTorch sees none")
    return ", ".join(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))

def build():
    import torch
    if torch.version.cuda is None:
        raise RuntimeError(f"{torch.__version__} is no CUDA build")
    return torch.__version__

parts = [
    report("driver library libcuda.so.1", driver, "vLLM's engines need it: run on a node with GPUs, or install NVIDIA's driver libraries"),
    report("torch", build, "pip install -r requirements/gpu.txt"),
    report("GPUs", gpus, "nvidia-smi says what the driver sees"),
    report("megatron-core", version("megatron.core"), "pip install -r requirements/gpu.txt"),
    report("vllm", version("vllm"), "pip install -r requirements/gpu.txt"),
    report("Transformer Engine", version("transformer_engine.pytorch"), "runs then use the project's own layers, model.layers=local"),
]
sys.exit(0 if all(parts) else 1)
PYTHON
}

main() {
    local python="python3" only_check="" compile=1
    VENV="$PROJECT_ROOT/.venv"
    while [ $# -gt 0 ]; do
        case "$1" in
            -h | --help) sed -n '2,13s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
            --venv) VENV="${2:?--venv needs a directory}"; shift ;;
            --python) python="${2:?--python needs a path}"; shift ;;
            --without-transformer-engine) compile="" ;;
            --check) only_check=1 ;;
            *) fail "unknown option $1; --help lists them" ;;
        esac
        shift
    done
    PYTHON="$VENV/bin/python"
    if [ -z "$only_check" ]; then
        install_packages "$python"
        [ -z "$compile" ] || compile_transformer_engine
    fi
    check
}

main "$@"
