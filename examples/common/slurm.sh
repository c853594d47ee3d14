# Sourced by the recipes' slurm.sh, inside a batch job that was submitted from the project's root.
#
# `run_recipe LAUNCH "$@"` starts LAUNCH once on every node of the job. The first node is node 0: its first process is
# rank 0, which computes rewards and writes the record of the run. run.directory and model.path must be on a file system
# that all nodes see. vLLM runs in one of two ways:
#
#   on the same nodes    (default) beside the trainer's processes, on the first rollout.engines * rollout.tensor_parallel
#                        GPUs of node 0, or, with rollout.nodes=all, of every node.
#   on nodes of its own  ROLLOUT_NODES=2 sbatch --nodes=6 .../slurm.sh: the first four nodes train, on the last two
#                        pmpo-rollout-node starts rollout.engines vLLMs on each for them, with 0.9 of the GPUs' memory. New
#                        weights reach them over NCCL (bridge.transport=auto).
#
#   ROLLOUT_PORT         where pmpo-rollout-node listens (default: 7400)
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
        start_nodes "$launch"
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

# Starts pmpo-rollout-node on the last ROLLOUT_NODES of `hosts` and sets `rollouts` to what the trainer needs.
start_nodes() {
    local list
    local -a nodes=("${hosts[@]:NNODES}")
    [ "$NNODES" -gt 0 ] || { echo "error: ROLLOUT_NODES=$ROLLOUT_NODES leaves no node to train" >&2; exit 2; }
    export ROLLOUT_PORT="${ROLLOUT_PORT:-7400}" ROLLOUT_KEY="$PWD/rollout-key-$SLURM_JOB_ID"
    (umask 077 && head -c 32 /dev/urandom | base64 >"$ROLLOUT_KEY")
    echo "job $SLURM_JOB_ID: vLLM on ${nodes[*]}; what its nodes say: vllm-$SLURM_JOB_ID.log"
    srun --nodes="$ROLLOUT_NODES" --ntasks="$ROLLOUT_NODES" --ntasks-per-node=1 --nodelist="$(joined "${nodes[@]}")" \
        --output="vllm-$SLURM_JOB_ID.log" bash "$1" --rollout-node &
    rollout_job=$!
    trap stop_nodes EXIT
    list="$(joined "${nodes[@]/%/:$ROLLOUT_PORT}")"
    rollouts=(rollout.nodes=own "rollout.hosts=[$list]" "rollout.key_file=$ROLLOUT_KEY"
        rollout.kv_cache_gib=null rollout.gpu_memory_utilization=0.9)
}

stop_nodes() {
    kill "$rollout_job" 2>/dev/null || true
    wait "$rollout_job" 2>/dev/null || true
    rm -f "$ROLLOUT_KEY"
}
