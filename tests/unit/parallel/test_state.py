"""Layouts that cannot work are refused before any process group exists."""

import json
import os
import subprocess
import sys

import pytest

from pmpo_megatron.config import build
from pmpo_megatron.errors import ConfigError
from pmpo_megatron.parallel.state import ParallelConfig, initialize


@pytest.mark.parametrize(
    "values, message",
    [
        ({"sequence_parallel": True}, "sequence_parallel: needs tensor > 1"),
        ({"virtual_pipeline": 2}, "virtual_pipeline: 2 needs pipeline > 1"),
        ({"tensor": 2, "expert": 2, "expert_tensor": 4}, "expert_tensor: 4 must divide tensor = 2"),
        ({"tensor": 2, "expert_tensor": 1}, "expert_tensor: 1 with tensor 2 needs expert > 1"),
        ({"tensor": 0}, "tensor: 0 must be at least 1"),
        ({"stall_s": 10.0, "heartbeat_s": 5.0}, "stall_s: 10 s must be at least four heartbeats of 5 s"),
        ({"tensr": 2}, "did you mean 'tensor'"),
    ],
)
def test_bad_layouts(values, message):
    with pytest.raises(ConfigError, match=message):
        build(ParallelConfig, values)


def test_data_parallel_size():
    layout = ParallelConfig(tensor=2, pipeline=2, context=2)
    assert layout.data_parallel_size(16) == 2
    with pytest.raises(ConfigError, match="tensor 2 \\* pipeline 2 \\* context 2 = 8 must divide the 12 processes"):
        layout.data_parallel_size(12)


def test_copies_of_an_expert():
    layout = ParallelConfig(tensor=4, pipeline=2, expert=8, expert_tensor=1)
    assert (layout.data_parallel_size(32), layout.expert_data_parallel_size(32)) == (4, 2)
    with pytest.raises(ConfigError, match="expert 8 \\* expert_tensor 1 \\* pipeline 2 = 16 must divide the 24 processes"):
        layout.data_parallel_size(24)


def test_without_torchrun_the_missing_variables_are_named(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set"):
        initialize(ParallelConfig())


def test_a_device_that_is_not_there(monkeypatch):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    for name, value in dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, MASTER_ADDR="127.0.0.1", MASTER_PORT=1).items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ConfigError, match="cuda, but PyTorch sees no GPU here"):
        initialize(ParallelConfig(), device="cuda")
    with pytest.raises(ConfigError, match="'tpu' is not one of"):
        initialize(ParallelConfig(), device="tpu")


LISTENING = """
import json, os
from pmpo_megatron.parallel.state import ParallelConfig, initialize
initialize(ParallelConfig(), device="cpu")
descriptors = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
mine = {os.readlink(path) for path in descriptors if os.path.islink(path)}
lines = [line.split() for name in ("tcp", "tcp6") for line in list(open(f"/proc/net/{name}"))[1:]]
print(json.dumps([line[1] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in mine]))
"""


def test_a_run_of_one_process_listens_on_no_interface_but_the_loopback():
    """Addresses as the kernel prints them: bytes of 127.0.0.1 from the last to the first, then the port."""
    variables = dict(
        RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0", GLOO_SOCKET_IFNAME="lo"
    )
    run = subprocess.run([sys.executable, "-c", LISTENING], env=dict(os.environ, **variables), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    addresses = json.loads(run.stdout.splitlines()[-1])
    assert [address for address in addresses if not address.startswith("0100007F:")] == []
