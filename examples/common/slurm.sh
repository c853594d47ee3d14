# Sourced by the recipes' slurm.sh, inside a batch job that was submitted from the project's root.
#
# `run_recipe LAUNCH "$@"` starts LAUNCH once on every node of the job. The first node is node 0: its first process is
# rank 0, which starts vLLM on that node's first GPUs (rollout.tensor_parallel of them) beside the trainer's processes
# there, computes rewards, and writes the record of the run. The other nodes only train. run.directory and model.path must
# be on a file system that all nodes see.
#
# Slurm's warning before the time limit (#SBATCH --signal=B:USR1@...) makes the trainer save and stop; submitting the same
# script again goes on from there.

run_recipe() {
    local launch="$1" job code
    local -a hosts
    shift
    [ -n "${SLURM_JOB_ID:-}" ] || { echo "error: submit this with sbatch, from the project's root" >&2; exit 2; }
    mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    export NNODES="$SLURM_JOB_NUM_NODES" MASTER_ADDR="${hosts[0]}" MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
    echo "job $SLURM_JOB_ID: $NNODES nodes, node 0 is $MASTER_ADDR:$MASTER_PORT"
    trap ask_to_stop USR1
    srun --ntasks-per-node=1 --kill-on-bad-exit=1 bash -c 'NODE_RANK="$SLURM_NODEID" exec bash "$0" "$@"' "$launch" "$@" &
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
    srun --overlap --nodes=1 --ntasks=1 --nodelist="$MASTER_ADDR" pkill -USR1 -f '[p]mpo_megatron.train --config' || true
}
