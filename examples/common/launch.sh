# Sourced by the recipes' launch.sh, which sets NODES, SUMMARY and perhaps HARDWARE and then calls `launch CONFIG "$@"`.

PROJECT_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"

launch_usage() {
    cat <<TEXT
$SUMMARY

usage: [VARIABLE=value ...] bash ${BASH_SOURCE[-1]} [--dry-run | --rollout-node | --help] [section.key=value ...]

One command on each node. What follows the options overrides fields of the configuration.

  --dry-run       check the configuration and plan memory and time; starts nothing, needs neither GPUs nor weights
  --rollout-node  start no trainer, but wait for one on other nodes to start its vLLMs here (pmpo-rollout-node)

  NNODES          nodes (default: $NODES)
  NODE_RANK       which of them this is, from 0; needed with more than one. The one with 0 also scores and logs
  MASTER_ADDR     host of node 0; needed with more than one
  MASTER_PORT     a port that is free there (default: 29500)
  GPUS_PER_NODE   processes on each node (default: 8)
  HARDWARE        with --dry-run: GPUs to plan for (default: ${HARDWARE:-what this machine has, or h100-80gb})
  ROLLOUT_PORT    with --rollout-node: where it listens (default: 7400)
  ROLLOUT_KEY     with --rollout-node: the run's rollout.key_file
  GLOO_SOCKET_IFNAME  network interface between nodes (default: found where the host's name means 127.0.1.1)
  PYTHON          interpreter (default: .venv/bin/python of this project, or python)
TEXT
}

launch_fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

# Where this host's own name means 127.0.1.1, as on Debian, gloo would listen where no other node reaches it.
choose_interface() {
    local interface="" address
    [ -z "${GLOO_SOCKET_IFNAME:-}" ] && getent ahostsv4 "$(hostname)" | grep -q '^127\.' || return 0
    address="$(getent ahostsv4 "$MASTER_ADDR" | awk '{print $1; exit}')" || true # unknown here: torchrun says so
    [ -z "$address" ] || interface="$(ip -o route get "$address" | sed -n 's/.* dev \([^ ]*\).*/\1/p')"
    [ -n "$interface" ] && [ "$interface" != lo ] || # on node 0 itself
        interface="$(ip -o route show default | sed -n 's/.* dev \([^ ]*\).*/\1/p' | head -n 1)"
    [ -n "$interface" ] || launch_fail "GLOO_SOCKET_IFNAME: name the network interface to the other nodes; $(hostname) means 127.*"
    export GLOO_SOCKET_IFNAME="$interface"
}

launch() {
    local config="$1" nodes="${NNODES:-$NODES}" gpus="${GPUS_PER_NODE:-8}" dry="" node="" python
    local -a overrides=() rendezvous
    shift
    while [ $# -gt 0 ]; do
        case "$1" in
            -h | --help) launch_usage; exit 0 ;;
            --dry-run) dry=1 ;;
            --rollout-node) node=1 ;;
            -*) launch_usage >&2; launch_fail "unknown option $1" ;;
            *=*) overrides+=("$1") ;;
            *) launch_fail "$1: an override has the form section.key=value" ;;
        esac
        shift
    done
    python="${PYTHON:-$PROJECT_ROOT/.venv/bin/python}"
    command -v "$python" >/dev/null || python=python
    cd "$PROJECT_ROOT"
    if [ -n "$node" ]; then
        [ -n "${ROLLOUT_KEY:-}" ] || launch_fail "ROLLOUT_KEY: the run's rollout.key_file is needed with --rollout-node"
        exec "$python" -m pmpo_megatron.commands.rollout_node --host 0.0.0.0 --port "${ROLLOUT_PORT:-7400}" --key-file "$ROLLOUT_KEY"
    fi
    if [ -n "$dry" ]; then
        exec "$python" -m pmpo_megatron.commands.train --config "$config" --dry-run --world-size $((nodes * gpus)) \
            ${HARDWARE:+--hardware "$HARDWARE"} "${overrides[@]}"
    fi
    if [ "$nodes" -eq 1 ]; then
        rendezvous=(--standalone)
    else
        [ -n "${MASTER_ADDR:-}" ] || launch_fail "MASTER_ADDR: the host of node 0 is needed with $nodes nodes"
        [ -n "${NODE_RANK:-}" ] || launch_fail "NODE_RANK: 0 to $((nodes - 1)) is needed with $nodes nodes"
        choose_interface
        rendezvous=(--nnodes "$nodes" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
    fi
    export CUDA_DEVICE_MAX_CONNECTIONS=1 # Megatron: keeps communication and products of tensor parallelism in order
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}" TOKENIZERS_PARALLELISM=false
    trap '' USR1 # asks the trainer's processes to save and stop; torchrun itself would die of it
    exec "$python" -m torch.distributed.run "${rendezvous[@]}" --nproc-per-node "$gpus" \
        -m pmpo_megatron.commands.train --config "$config" "${overrides[@]}"
}
