# Sourced by the recipes' slurm.sh, inside a batch job that was submitted from the project's root.
#
# `run_recipe LAUNCH "$@"` starts LAUNCH once on every node of the job. The first node is node 0: its first process is
# rank 0, which computes rewards and writes the record of the run. run.directory and model.path must be on a file system
# that all nodes see. vLLM runs in one of two ways:
#
#   on the same nodes    (default) beside the trainer's processes, on the first rollout.engines * rollout.tensor_parallel
#                        GPUs of node 0, or, with rollout.nodes=all, of every node.
#   on nodes of its own  ROLLOUT_NODES=2 sbatch --nodes=6 .../slurm.sh: the last two nodes run vLLM servers, one for every
#                        rollout.tensor_parallel GPUs; the first four train, once every server answers. New weights reach
#                        the servers over NCCL (bridge.transport=auto).
#
#   ROLLOUT_TIMEOUT_S    how long the servers may take to start (default: 1800)
#   ROLLOUT_PORT         of the first server on a node (default: 8000)
#   SERVE_ARGS           more options of tools/serve.py, such as "--memory 0.8", and of vLLM's server after --
#
# Slurm's warning before the time limit (#SBATCH --signal=B:USR1@...) makes the trainer save and stop; submitting the same
# script again goes on from there.

run_recipe() {
    local launch="$1" job code
    local -a hosts placement=() rollouts=()
    shift
    [ -n "${SLURM_JOB_ID:-}" ] || { echo "error: submit this with sbatch, from the project's root" >&2; exit 2; }
    mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    export NNODES=$((SLURM_JOB_NUM_NODES - ${ROLLOUT_NODES:-0}))
    # Below the ports that Linux hands out by itself, from 32768 on: another program could have taken one of these.
    export MASTER_ADDR="${hosts[0]}" MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
    # Since Slurm 22.05 steps do not take over --cpus-per-task: they would get one core.
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
    echo "job $SLURM_JOB_ID: $NNODES nodes, node 0 is $MASTER_ADDR:$MASTER_PORT"
    if [ "${ROLLOUT_NODES:-0}" -gt 0 ]; then
        start_servers "$launch" "$@"
        placement=(--nodes="$NNODES" --ntasks="$NNODES" --nodelist="$(joined "${hosts[@]:0:NNODES}")")
    fi
    trap ask_to_stop USR1
    srun "${placement[@]}" --ntasks-per-node=1 --kill-on-bad-exit=1 bash -c 'NODE_RANK="$SLURM_NODEID" exec bash "$0" "$@"' \
        "$launch" "${rollouts[@]}" "$@" &
    job=$!
    while :; do
        interrupted=""
        wait "$job" && return 0 || code=$?
        # Slurm's warning ends `wait` early, with a code above 128; the job's own end gives the job's code.
        [ -n "$interrupted" ] && [ "$code" -gt 128 ] || return "$code"
    done
}

ask_to_stop() {
    interrupted=1
    echo "job $SLURM_JOB_ID: the time limit is near; asking the trainer to save and stop"
    SRUN_CPUS_PER_TASK=1 srun --overlap --nodes=1 --ntasks=1 --nodelist="$MASTER_ADDR" pkill -USR1 -f '[p]mpo_megatron.commands.train --config' || true
}

joined() { local IFS=,; printf '%s' "$*"; }

# Starts servers on the last ROLLOUT_NODES of `hosts`, waits for all of them, and sets `rollouts` to what the trainer needs.
start_servers() {
    local port="${ROLLOUT_PORT:-8000}" list host each
    local -a urls=() ports nodes=("${hosts[@]:NNODES}")
    [ "$NNODES" -gt 0 ] || { echo "error: ROLLOUT_NODES=$ROLLOUT_NODES leaves no node to train" >&2; exit 2; }
    export SERVE_ARGS="--host 0.0.0.0 --port $port ${SERVE_ARGS:-}"
    list="$(bash "$@" --serve --dry-run)" || exit 2
    mapfile -t ports < <(cut -d' ' -f1 <<<"$list")
    for host in "${nodes[@]}"; do
        for each in "${ports[@]}"; do urls+=("http://$host:$each"); done
    done
    echo "job $SLURM_JOB_ID: vLLM on ${nodes[*]}, ports ${ports[*]}; its output: vllm-$SLURM_JOB_ID.log"
    srun --nodes="$ROLLOUT_NODES" --ntasks="$ROLLOUT_NODES" --ntasks-per-node=1 --nodelist="$(joined "${nodes[@]}")" \
        --kill-on-bad-exit=1 --output="vllm-$SLURM_JOB_ID.log" bash "$@" --serve &
    servers=$!
    trap stop_servers EXIT
    wait_for_servers "${urls[@]}"
    rollouts=(rollout.engine=server "rollout.urls=[$(joined "${urls[@]}")]" "bridge.address=$MASTER_ADDR")
}

wait_for_servers() {
    local url problem timeout="${ROLLOUT_TIMEOUT_S:-1800}" started=$SECONDS
    for url in "$@"; do
        until curl --silent --fail --noproxy '*' --max-time 5 --output /dev/null "$url/health"; do
            problem=""
            kill -0 "$servers" 2>/dev/null || problem="the vLLM servers ended before $url answered"
            [ $((SECONDS - started)) -lt "$timeout" ] ||
                problem="no answer from $url/health within $timeout s (ROLLOUT_TIMEOUT_S)"
            [ -z "$problem" ] || { echo "error: $problem; see vllm-$SLURM_JOB_ID.log" >&2; exit 1; }
            sleep 1
        done
    done
    echo "job $SLURM_JOB_ID: $# vLLM servers answer"
}

stop_servers() {
    kill "$servers" 2>/dev/null || true
    wait "$servers" 2>/dev/null || true
}
