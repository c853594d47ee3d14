"""One run at a time in a directory: real processes that hold it, are killed, are stopped, or seem to be on another host."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from pmpo_megatron.checkpoint.run_lock import RunLock, read_owner
from pmpo_megatron.errors import ConfigError

HOLD = """
import sys, time
from pmpo_megatron.checkpoint.run_lock import RunLock
lock = RunLock(sys.argv[1], renew_s=0.1, lease_s=1.0)
print("holds", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of ``tmp_path``."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "holds\n"
    yield process
    process.kill()
    process.wait()


def take(directory):
    return RunLock(directory, renew_s=0.1, lease_s=1.0)


def pretend(directory, **changes):
    """The owner's entry with ``changes``, its time of change as it was."""
    path = directory / "run.lock"
    changed = path.stat().st_mtime_ns
    path.write_text(json.dumps(read_owner(path) | changes))
    os.utime(path, ns=(changed, changed))


def test_a_second_run_is_told_who_is_there(holder, tmp_path):
    with pytest.raises(ConfigError, match=rf"in use by process {holder.pid} on host \S+ \(last sign of life \d s ago\)"):
        take(tmp_path)
    assert holder.poll() is None and read_owner(tmp_path / "run.lock")["process"] == holder.pid


def test_a_stopped_run_still_holds_it(holder, tmp_path):
    holder.send_signal(signal.SIGSTOP)
    time.sleep(1.3)
    with pytest.raises(ConfigError, match="last sign of life [1-9] s ago"):
        take(tmp_path)


def test_a_killed_run_is_taken_over_at_once(holder, tmp_path):
    holder.kill()
    holder.wait()
    began = time.monotonic()
    lock = take(tmp_path)
    assert time.monotonic() - began < 1 and read_owner(tmp_path / "run.lock")["process"] == os.getpid()
    lock.close()


def test_closed_and_taken_again(tmp_path):
    for _ in range(3):
        take(tmp_path).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.lock"]


class TestWithoutLocksOfTheFileSystem:
    """``flock`` that always succeeds stands for a network file system without locks; only the signs of life are left."""

    @pytest.fixture(autouse=True)
    def no_locks(self, monkeypatch):
        monkeypatch.setattr("pmpo_megatron.checkpoint.run_lock.fcntl.flock", lambda *_: None)

    def test_the_same_host_is_asked_for_the_process(self, holder, tmp_path):
        with pytest.raises(ConfigError, match=f"in use by process {holder.pid}"):
            take(tmp_path)

    def test_a_process_number_that_is_used_again_is_another_process(self, tmp_path):
        lock = take(tmp_path)
        lock._closing.set()
        lock._thread.join()
        pretend(tmp_path, start=1)
        take(tmp_path).close()

    def test_another_host_that_gives_signs_of_life(self, tmp_path):
        """As seen by a reader whose host is another one."""
        code = "import pmpo_megatron.checkpoint.run_lock as m; m.host_tag = lambda: 'elsewhere'\n" + HOLD
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout.readline() == "holds\n"
            with pytest.raises(ConfigError, match=f"in use by process {process.pid} on host"):
                take(tmp_path)
            process.kill()
            began = time.monotonic()
            lock = take(tmp_path)
            assert 0.5 < time.monotonic() - began < 5, "the lease is waited for"
            lock.close()
        finally:
            process.kill()
            process.wait()

    def test_whoever_gave_no_sign_in_time_ends(self, holder, tmp_path):
        pretend(tmp_path, tag="another", process=1)
        assert holder.wait(timeout=5) == 70


def test_a_run_whose_directory_is_removed_takes_it_again(holder, tmp_path):
    (tmp_path / "run.lock").unlink()
    deadline = time.monotonic() + 5
    while read_owner(tmp_path / "run.lock") is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with pytest.raises(ConfigError, match=f"in use by process {holder.pid}"):
        take(tmp_path)
