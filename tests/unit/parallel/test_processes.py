"""What killed processes leave is removed and what living ones hold is not; a process ends with the torchrun that started it."""

import os
import signal
import subprocess
import sys
import time

from pmpo_megatron.parallel.processes import owned_prefix, start_time, sweep

MAKE = """
import sys, tempfile, time
from pmpo_megatron.parallel.processes import owned_prefix
prefix = owned_prefix("pmpo-test-")
tempfile.mkstemp(prefix=prefix, dir=sys.argv[1]), tempfile.mkdtemp(prefix=prefix, dir=sys.argv[1])
print("made", flush=True)
time.sleep(60)
"""
WORKER = """
import os, sys, time
from pmpo_megatron.parallel.processes import end_with_launcher
end_with_launcher()
print(os.getpid(), flush=True)
time.sleep(60)
"""


def test_only_what_dead_processes_left_is_removed(tmp_path):
    processes = [subprocess.Popen([sys.executable, "-c", MAKE, tmp_path], stdout=subprocess.PIPE) for _ in range(2)]
    try:
        for process in processes:
            assert process.stdout.readline() == b"made\n"
        foreign = ["pmpo-test-other", f"pmpo-test-aaaaaaaaaaaa-{processes[0].pid}-1-x", "unrelated"]
        for name in foreign:
            (tmp_path / name).write_text("")
        assert sweep("pmpo-test-", tmp_path) == []
        processes[0].kill()
        processes[0].wait()
        removed = sweep("pmpo-test-", tmp_path)
        assert len(removed) == 2 and all(f"-{processes[0].pid}-" in path.name for path in removed)
        left = {path.name for path in tmp_path.iterdir()}
        assert len(left) == 5 and left >= set(foreign)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_a_number_that_is_used_again_is_another_process(tmp_path):
    mine = owned_prefix("pmpo-test-")
    (tmp_path / f"{mine}a").write_text("")
    (tmp_path / f"{mine.replace(str(start_time(os.getpid())), '1')}a").write_text("")
    assert len(sweep("pmpo-test-", tmp_path)) == 1 and (tmp_path / f"{mine}a").exists()
    assert sweep("pmpo-test-", tmp_path / "gone") == []


def launch(tmp_path, code):
    script = tmp_path / "worker.py"
    script.write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", str(script)]
    environment = dict(os.environ, PYTHONPATH=os.getcwd())
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=open(tmp_path / "errors", "w"),
        text=True,
        env=environment,
        start_new_session=True,
    )


def test_a_worker_ends_with_its_launcher_and_says_so(tmp_path):
    launcher = launch(tmp_path, WORKER)
    try:
        worker = int(launcher.stdout.readline())
        os.kill(launcher.pid, signal.SIGKILL)
        launcher.wait()
        deadline = time.monotonic() + 10
        while start_time(worker) is not None:
            assert time.monotonic() < deadline, "the worker lives on"
            time.sleep(0.05)
        assert f"error (rank 0): torchrun (process {launcher.pid}) is gone" in (tmp_path / "errors").read_text()
    finally:
        launcher.kill()


def test_without_torchrun_nothing_is_watched(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_RUN_ID"}
    code = f"import threading\n{WORKER.replace('time.sleep(60)', 'print(threading.active_count())')}"
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert found.stdout.splitlines()[1] == "1"
