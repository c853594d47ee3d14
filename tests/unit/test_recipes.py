"""Every example's configuration is valid, fits its GPUs, and is what its launch script starts."""

import os
import re
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pmpo_megatron.config import apply_overrides, build, read_yaml
from pmpo_megatron.monitor.study import read_study
from pmpo_megatron.planner import HARDWARE, plan
from pmpo_megatron.planner.text import plan_lines
from pmpo_megatron.training.run_config import RunConfig
from tests.distributed.harness import free_port

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
RECIPES = {  # configuration: (nodes of 8 GPUs, its launch script with arguments)
    "qwen2.5-math-7b/config.yaml": (1, ["qwen2.5-math-7b/launch.sh"]),
    "deepseek-r1-distill-qwen-7b/config.yaml": (1, ["deepseek-r1-distill-qwen-7b/launch.sh"]),
    "qwen2.5-coder-7b/config.yaml": (1, ["qwen2.5-coder-7b/launch.sh"]),
    "qwen2.5-14b/config.yaml": (2, ["qwen2.5-14b/launch.sh"]),
    "qwen2.5-32b/config.yaml": (4, ["qwen2.5-32b/launch.sh"]),
    "llama-3.3-70b/config.yaml": (16, ["llama-3.3-70b/launch.sh"]),
    "qwen2.5-72b/config.yaml": (16, ["qwen2.5-72b/launch.sh"]),
    "long_context/config-32k.yaml": (1, ["long_context/launch.sh"]),
    "long_context/config-128k.yaml": (4, ["long_context/launch.sh", "128k"]),
    "qwen3-30b-a3b/config-8.yaml": (1, ["qwen3-30b-a3b/launch.sh"]),
    "qwen3-30b-a3b/config-16.yaml": (2, ["qwen3-30b-a3b/launch.sh", "16"]),
    "qwen3-235b-a22b/config.yaml": (16, ["qwen3-235b-a22b/launch.sh"]),
}
LARGE_GPUS = {"qwen3-30b-a3b/config-8.yaml", "qwen3-235b-a22b/config.yaml"}  # of 141 GB; the others have 80 GB
FITS = [(name, kind) for name in RECIPES for kind in (["h200-141gb"] if name in LARGE_GPUS else ["h100-80gb", "a100-80gb"])]
MARGIN_GIB = 5  # activations are estimates


def load(name):
    return build(RunConfig, read_yaml(EXAMPLES / name))


def run_script(arguments, **environment):
    script, *rest = arguments
    kept = {k: v for k, v in os.environ.items() if k not in ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "PYTHON")}
    command = ["bash", str(EXAMPLES / script), *rest]
    return subprocess.run(command, env=kept | environment, cwd=ROOT, capture_output=True, text=True, timeout=250)


@pytest.mark.parametrize("name", sorted(str(path.relative_to(EXAMPLES)) for path in EXAMPLES.glob("*/config*.yaml")))
def test_every_examples_configuration_is_valid(name):
    load(name)


def test_the_quickstart_with_experts_has_the_configuration_of_the_other_and_replays_routes():
    command = (EXAMPLES / "quickstart-moe/run.sh").read_text().splitlines()[-2:]
    overrides = [word for line in command for word in line.split() if "=" in word]
    config = build(RunConfig, apply_overrides(read_yaml(EXAMPLES / "quickstart/config.yaml"), overrides))
    assert (
        config.round.routing_replay == "rollout"
        and config.run.rounds * config.batch.steps_per_round == config.optimizer.decay_steps
    )


def test_every_folder_with_a_launch_script_is_tested_here():
    assert {script.parent.name for script in EXAMPLES.glob("*/launch.sh")} - {"common"} == {n.split("/")[0] for n in RECIPES}


@pytest.mark.parametrize(("name", "hardware"), FITS)
def test_recipes_fit_with_a_margin(name, hardware):
    found = plan(load(name), 8 * RECIPES[name][0], HARDWARE[hardware])
    assert found.fits, found.problems
    assert found.fullest.spare >= MARGIN_GIB * 2**30
    assert not found.notes


@pytest.mark.parametrize("name", ("qwen2.5-math-7b/config.yaml", "deepseek-r1-distill-qwen-7b/config.yaml"))
def test_the_papers_setting(name):
    config = load(name)
    trajectories = config.batch.prompts_per_round * config.sampling.samples_per_prompt
    assert (config.sampling.samples_per_prompt, config.sampling.max_tokens, trajectories) == (8, 3000, 1024)
    assert (trajectories // config.batch.steps_per_round, config.sampling.temperature) == (128, 1.0)
    assert (config.optimizer.learning_rate, config.optimizer.schedule) == (1e-6, "constant")
    assert (config.objective.rule, config.objective.kl_coefficient) == ("ess", 0.0)


@pytest.mark.parametrize("name", RECIPES)
def test_the_launch_script_dry_runs_without_gpus_and_weights(name):
    nodes, script = RECIPES[name]
    bare = ["run.rounds=7", "rewards.code.isolation=unsandboxed"]  # bubblewrap need not be here
    done = run_script([*script, "--dry-run", *bare], PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    assert f"layout: {8 * nodes} processes" in done.stdout and "batch: 7 rounds" in done.stdout
    assert "\nfits, with" in done.stdout


@pytest.fixture
def stub(tmp_path):
    """Stands in for a command: prints its name, variables of interest and its arguments."""

    def make(name, body='echo "$0 $NODE_RANK: $*"'):
        path = tmp_path / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return str(path)

    return make


def test_the_guides_example_is_what_the_planner_says():
    text = (ROOT / "docs/parallelism.md").read_text()
    shown = text[text.index("\nplan: models/Qwen2.5-32B") + 1 : text.index("proposals, fastest training first:")]
    assert shown.splitlines() == plan_lines(plan(load("qwen2.5-32b/config.yaml"), 32, HARDWARE["h100-80gb"]))


def test_launch_starts_torchrun_on_one_node(stub):
    done = run_script(["qwen2.5-math-7b/launch.sh", "run.rounds=3"], PYTHON=stub("python"))
    expected = (
        "-m torch.distributed.run --standalone --nproc-per-node 8 -m pmpo_megatron.commands.train "
        "--config examples/qwen2.5-math-7b/config.yaml run.rounds=3"
    )
    assert done.returncode == 0 and done.stdout.strip().endswith(expected)


def test_launch_starts_torchrun_on_every_node(stub):
    where = dict(PYTHON=stub("python"), NODE_RANK="2", MASTER_ADDR="first", MASTER_PORT="1234", GPUS_PER_NODE="4")
    done = run_script(["qwen2.5-32b/launch.sh"], **where)
    expected = (
        "--nnodes 4 --node-rank 2 --master-addr first --master-port 1234 --nproc-per-node 4 -m pmpo_megatron.commands.train"
    )
    assert done.returncode == 0 and expected in done.stdout


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ([], {"NODE_RANK": "0"}, "MASTER_ADDR: the host of node 0 is needed with 4 nodes"),
        ([], {"MASTER_ADDR": "first"}, "NODE_RANK: 0 to 3 is needed with 4 nodes"),
        (["--frobnicate"], {}, "unknown option --frobnicate"),
        (["rounds"], {}, "rounds: an override has the form section.key=value"),
        (["--rollout-node"], {}, "ROLLOUT_KEY: the run's rollout.key_file is needed"),
    ],
)
def test_launch_refuses_what_cannot_work(stub, arguments, environment, message):
    done = run_script(["qwen2.5-32b/launch.sh", *arguments], PYTHON=stub("python"), **environment)
    assert done.returncode == 2 and message in done.stderr and not done.stdout


@pytest.mark.parametrize("name", sorted({script[0] for _, script in RECIPES.values()}))
def test_launch_has_help(name):
    done = run_script([name, "--help"])
    assert done.returncode == 0 and f"bash {EXAMPLES / name}" in done.stdout and "MASTER_ADDR" in done.stdout


@pytest.mark.parametrize("name", RECIPES)
def test_slurm_starts_the_launch_script_on_every_node(stub, tmp_path, name):
    nodes, (script, *arguments) = RECIPES[name]
    stub("scontrol", 'echo "node7"; echo "node8"')
    stub("srun", 'while [[ "$1" == --* ]]; do shift; done; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done')
    job = dict(SLURM_JOB_ID="5", SLURM_JOB_NUM_NODES=str(max(nodes, 2)), SLURM_JOB_NODELIST="node[7-8]")
    slurm = [str(Path(script).parent / "slurm.sh"), *arguments, "run.rounds=2"]
    done = run_script(slurm, PATH=f"{tmp_path}:{os.environ['PATH']}", PYTHON=stub("python"), **job)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        assert f"--node-rank {rank} --master-addr node7 --master-port 20005" in done.stdout
    assert f"examples/{name} run.rounds=2" in done.stdout


def test_slurms_steps_get_the_jobs_cores_and_a_port_that_linux_does_not_hand_out(stub, tmp_path):
    """SRUN_CPUS_PER_TASK, and --mem=0 in the script's own directives; ports from 32768 on are the system's."""
    stub("scontrol", 'echo "node7"; echo "node8"')
    stub("srun", 'echo "cores $SRUN_CPUS_PER_TASK port $MASTER_PORT"')
    job = dict(SLURM_JOB_ID="29999", SLURM_JOB_NUM_NODES="2", SLURM_JOB_NODELIST="x", SLURM_CPUS_PER_TASK="64")
    done = run_script(["qwen2.5-14b/slurm.sh"], PATH=f"{tmp_path}:{os.environ['PATH']}", **job)
    assert "cores 64 port 29999\n" in done.stdout
    scripts = set(EXAMPLES.glob("*/slurm.sh")) - {EXAMPLES / "common/slurm.sh"}
    assert all("#SBATCH --mem=0\n" in script.read_text() for script in scripts)


@pytest.mark.parametrize(
    ("addresses", "device", "interface"),
    [("127.0.1.1 STREAM", "ib0", "ib0"), ("10.1.2.3 STREAM", "ib0", ""), ("127.0.1.1 STREAM", "lo", "eth7")],
)
def test_gloo_gets_an_interface_where_the_hosts_name_is_a_loopback_address(stub, tmp_path, addresses, device, interface):
    """The way to the first node; on that node itself, where this is the loopback, the default way."""
    stub("getent", f'[ "$2" = first ] && echo "10.9.9.9 STREAM" || echo "{addresses}"')
    stub(
        "ip",
        f'case "$*" in *default*) echo "default via 10.0.0.1 dev eth7 proto dhcp" ;; *) echo "$4 dev {device} src 1" ;; esac',
    )
    where = dict(PYTHON=stub("python", 'echo "interface=$GLOO_SOCKET_IFNAME"'), NODE_RANK="1", MASTER_ADDR="first")
    done = run_script(["qwen2.5-14b/launch.sh"], PATH=f"{tmp_path}:{os.environ['PATH']}", GLOO_SOCKET_IFNAME="", **where)
    assert done.returncode == 0 and f"interface={interface}\n" in done.stdout, (done.stdout, done.stderr)


def test_slurm_directives_ask_for_the_recipes_nodes():
    for nodes, script in RECIPES.values():
        text = (EXAMPLES / script[0]).with_name("slurm.sh").read_text()
        if len(script) > 1:  # not the script's default
            assert f"sbatch --nodes={nodes} " in text
        else:
            assert f"#SBATCH --nodes={nodes}\n" in text


def test_slurms_warning_asks_the_trainer_to_save(stub, tmp_path):
    """USR1 to the batch script reaches the trainer's processes through pkill, and the script goes on waiting for them."""
    stub("scontrol", 'echo "node7"')
    # The trainer is gone before the script that asked it is back: the job's own exit code has to count all the same.
    stub("pkill", f'echo "$*" > {tmp_path}/a && mv {tmp_path}/a {tmp_path}/asked; sleep 0.5')
    stub("srun", 'while [[ "$1" == --* ]]; do shift; done; "$@"')
    wait = f"kill -USR1 $PPID; for i in $(seq 1000); do [ -f {tmp_path}/asked ] && exit 0; sleep 0.1; done; exit 9"
    # The stub stands for the trainer: it plays Slurm's signal to its grandparent, the batch script, and waits to be asked.
    python = stub("python", f"sleep 0.3; PPID_OF_SRUN=$(ps -o ppid= -p $PPID); {wait.replace('$PPID', '$PPID_OF_SRUN')}")
    job = dict(SLURM_JOB_ID="5", SLURM_JOB_NUM_NODES="1", SLURM_JOB_NODELIST="node7")
    done = run_script(["qwen2.5-math-7b/slurm.sh"], PATH=f"{tmp_path}:{os.environ['PATH']}", PYTHON=python, **job)
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    assert (tmp_path / "asked").read_text() == "-USR1 -f [p]mpo_megatron.commands.train --config\n"


SRUN = """
while [[ "$1" == --* ]]; do
    case "$1" in --nodes=*) nodes="${1#*=}" ;; --nodelist=*) list="${1#*=}" ;; --output=*) exec > "${1#*=}" 2>&1 ;; esac
    shift
done
echo "srun on ${list:-all}"
[ "${nodes:-}" != 1 ] || { export SLURM_NODEID=0; exec "$@"; }
for SLURM_NODEID in $(seq 0 $((${nodes:-$SLURM_JOB_NUM_NODES} - 1))); do export SLURM_NODEID; "$@"; done
"""
NODE = f"""
case "$*" in
    *rollout_node*) exec {sys.executable} "$@" ;;
    *) timeout 100 bash -c 'until (: </dev/tcp/localhost/'"$ROLLOUT_PORT"'); do sleep 0.3; done' 2>/dev/null
        cat "$ROLLOUT_KEY" >key-seen
        echo "$NODE_RANK $NNODES: $*" ;;
esac
"""  # stands in for the interpreter: the node's agent is the real one, the trainer only waits until that listens


@pytest.fixture
def job(stub, tmp_path):
    """Runs a recipe's slurm.sh as a job of three nodes, the last of which is this machine; returns what it did."""

    def run(script, *arguments, **variables):
        stub("scontrol", 'echo "node7"; echo "node8"; echo "localhost"')
        stub("srun", SRUN)
        for name in ("examples", "pmpo_megatron", "tools"):
            if not (tmp_path / name).exists():
                (tmp_path / name).symlink_to(ROOT / name)
        environment = dict(SLURM_JOB_ID="5", SLURM_JOB_NUM_NODES="3", SLURM_JOB_NODELIST="x", ROLLOUT_PORT=str(free_port()))
        environment |= dict(PATH=f"{tmp_path}:{os.environ['PATH']}", PYTHON=stub("python", f"cd {tmp_path}\n{NODE}"))
        command = ["bash", f"examples/{script}", *arguments]
        environment = os.environ | environment | variables
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=250), environment

    return run


@pytest.mark.parametrize("recipe", ("qwen2.5-math-7b", "long_context"))
def test_slurm_runs_vllm_on_nodes_of_its_own(job, tmp_path, recipe):
    done, environment = job(f"{recipe}/slurm.sh", "run.rounds=2", ROLLOUT_NODES="1")
    assert done.returncode == 0, (done.stdout, done.stderr)
    port = environment["ROLLOUT_PORT"]
    assert "srun on localhost" in (tmp_path / "vllm-5.log").read_text() and "srun on node7,node8" in done.stdout
    for rank in (0, 1):
        assert f"{rank} 2: -m torch.distributed.run --nnodes 2 --node-rank {rank} --master-addr node7" in done.stdout
    key = tmp_path / "rollout-key-5"
    overrides = f"rollout.nodes=own rollout.hosts=[localhost:{port}] rollout.key_file={key}"
    assert done.stdout.count(overrides) == 2
    assert len((tmp_path / "key-seen").read_text().strip()) == 44 and not key.exists()
    with pytest.raises(OSError):  # and the agent has ended
        socket.create_connection(("localhost", int(port)), timeout=10)


def test_slurm_says_why_there_can_be_no_rollout_nodes(job):
    done, _ = job("qwen2.5-14b/slurm.sh", ROLLOUT_NODES="3")
    assert done.returncode == 2 and "ROLLOUT_NODES=3 leaves no node to train" in done.stderr


STUDIES = sorted(path.parent for path in EXAMPLES.glob("*/study.yaml"))


@pytest.mark.parametrize("directory", STUDIES, ids=lambda path: path.name)
def test_the_variants_of_a_study_have_the_same_budget_and_differ_in_what_the_axes_say(directory):
    study = read_study(directory / "study.yaml")
    base = read_yaml(ROOT / study.config)
    built = {
        levels: build(RunConfig, apply_overrides(base, [*study.settings, *overrides]))
        for levels, overrides in study.variants().items()
    }
    assert len(set(map(repr, built.values()))) == len(built)
    parts = ((c.batch.prompts_per_round, c.sampling, c.evaluation, c.optimizer.decay_steps) for c in built.values())
    assert len(set(map(repr, parts))) == 1, "equal numbers of trajectories"
    problems = {name: repr(part) for config in built.values() for name, part in config.data.parts().items()}
    assert all(problems[name] == repr(part) for c in built.values() for name, part in c.data.parts().items()), "equal problems"
    assert set(problems) == set(study.sources or [""])
    assert all(study.reference_of(levels) in built for levels in built)
    assert "common/study.sh" in (directory / "run.sh").read_text()


def test_the_start_model_of_the_domains_was_taught_what_runs_train_on():
    start = re.search(r"start_model=\((.+)\)", (EXAMPLES / "domains/run.sh").read_text())[1].split()
    config = load("domains/config.yaml")
    tasks = [f"{part.source}={','.join(map(str, part.levels))}" for part in config.data.parts().values()]
    assert start[0] == config.model.path and start[2 : 2 + len(tasks)] == tasks
    held_out = config.evaluation.data.parts()
    assert [(p.source, p.levels, p.rewards) for p in held_out.values()] == [
        (p.source, p.levels, p.rewards) for p in config.data.parts().values()
    ]
    assert {part.split for part in held_out.values()} == {"test"}
