"""The reward `code` and its sandbox: programs of all kinds of tests, hostile ones, and what is left of them."""

import json
import os
import platform
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pmpo_megatron.errors import ConfigError
from pmpo_megatron.rewards import RewardPool
from pmpo_megatron.rewards.code import CodeReward, check_sandbox
from pmpo_megatron.rewards.code_tests import last_program, read_tests, same_output, same_value
from pmpo_megatron.rewards.config import CodeConfig
from pmpo_megatron.rewards.sandbox.box import Limits, Outcome, Sandbox
from pmpo_megatron.rewards.sandbox.inside.program import decode, encode
from pmpo_megatron.rewards.sandbox.syscalls import CLONE, REFUSED, filter_program
from tests.unit.rewards.hostile import COSTLY, FORGERS, PROBES

PATIENT = Limits(wall_s=120.0, cpu_s=60)  # for programs that must succeed, however busy the machine is


def why_not():
    try:
        check_sandbox(CodeConfig())
    except ConfigError as error:
        return str(error)


WHY_NOT = why_not()
sandboxed = pytest.mark.skipif(WHY_NOT is not None, reason=f"no sandbox here: {WHY_NOT}")


def block(program):
    return f"Here it is:\n```python\n{program}\n```\n"


@pytest.fixture(scope="module")
def reward():
    reward = CodeReward(CodeConfig(wall_s=120.0))
    yield reward
    reward.close()


ADD = "a, b = map(int, input().split())\nprint(a {} b)"
FUNCTION = "def add(a, b):\n    return a {} b"
METHOD = "class Solution:\n    def add(self, a: Optional[int], b: int) -> int:\n        return a {} b"
PAIRS = {"inputs": ["1 2\n", "30 4\n"], "outputs": ["3\n", "34"]}
CASES = {
    "standard input and output": (ADD, {"tests": PAIRS}),
    "as a text": (ADD, {"tests": json.dumps(PAIRS)}),
    "LiveCodeBench, standard input": (ADD, {"tests": [{"input": "1 2", "output": "3", "testtype": "stdin"}]}),
    "LiveCodeBench, functional": (
        METHOD,
        {"func_name": "add", "tests": json.dumps([{"input": "1\n2", "output": "3", "testtype": "functional"}])},
    ),
    "LeetCode": (FUNCTION, {"tests": {"fn_name": "add", "inputs": [[1, 2], [30, 4]], "outputs": [3, [34]]}}),
    "MBPP": (FUNCTION, {"tests": ["assert add(1, 2) == 3", "assert math.isclose(add(.1, .2), .3)"]}),
    "MBPP, set up": (
        FUNCTION,
        {"setup": "import fractions\nk = fractions.Fraction(2)", "tests": ["assert add(1, int(k)) == 3"]},
    ),
    "HumanEval": (
        FUNCTION,
        {"entry_point": "add", "tests": "def check(candidate):\n    for i in range(9): assert candidate(i, 2 * i) == 3 * i\n"},
    ),
}


@sandboxed
@pytest.mark.parametrize("name", CASES)
def test_right_programs_score_1_and_wrong_ones_0(reward, name):
    program, metadata = CASES[name]
    assert reward(block(program.format("+")), [], metadata) == 1.0
    assert reward(block(program.format("-")), [], metadata) == 0.0
    assert reward(program.format("+"), [], metadata) == 0.0, "not in a block of code"


@sandboxed
@pytest.mark.parametrize(
    "program",
    [
        "import sys\nprint(sum(map(int, sys.stdin.read().split())))",
        "print(sum(map(int, open(0).read().split())))",
        "print(sum(map(int, open('/dev/stdin').read().split())))",
        "import sys, threading\nthreading.Thread(target=lambda: print(sum(map(int, input().split())))).start()",
        (
            "import subprocess, sys\n"
            "print(subprocess.run(['cat'], stdin=0, capture_output=True, text=True).stdout.count('') and 3)"
        ),
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\nprint(A(3).x)",
        "import asyncio\nasync def f(): return 3\nprint(asyncio.run(f()))",
        "if __name__ == '__main__':\n    print(3)\n    exit()",
        "import tempfile\nfile = tempfile.TemporaryFile()\nfile.write(b'3')\nfile.seek(0)\nprint(file.read().decode())",
    ],
)
def test_ordinary_ways_to_write_programs_work(reward, program):
    assert reward(block(program), [], {"tests": {"inputs": ["1 2"], "outputs": ["3"]}}) == 1.0


@sandboxed
def test_exceptions_of_the_program_reach_its_tests(reward):
    tests = "try:\n    f(1)\nexcept ValueError:\n    pass\nelse:\n    raise AssertionError"
    assert reward(block("def f(x): raise ValueError"), [], {"tests": tests}) == 1.0
    assert reward(block("def f(x): raise KeyError"), [], {"tests": tests}) == 0.0


@sandboxed
def test_tests_that_cannot_run_are_no_failure_of_the_program(reward):
    with pytest.raises(ValueError, match="No module named 'no_such_module'"):
        reward(block("def f(x): return x"), [], {"tests": "import no_such_module\nassert f(1) == 1"})


@sandboxed
def test_large_input_and_output(reward):
    numbers = " ".join(map(str, range(100_000)))
    tests = {"inputs": [numbers], "outputs": [numbers.replace(" ", "\n")]}
    assert reward(block("print(*input().split(), sep='\\n')"), [], {"tests": tests}) == 1.0


@pytest.fixture(scope="module")
def host():
    """A listener on this machine, and what programs need to know to look for it."""
    with socket.socket() as listener, socket.socket(socket.AF_UNIX) as abstract:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        abstract.bind(f"\0pmpo-test-{port}")
        abstract.listen()
        column = 1 if platform.machine() == "aarch64" else 0
        numbers = {"NR_BPF": REFUSED["bpf"], "NR_KEYCTL": REFUSED["keyctl"], "NR_CLONE": CLONE}
        yield {"PORT": str(port), "OUTSIDE": str(os.getpid())} | {name: str(pair[column]) for name, pair in numbers.items()}


def armed(program, host, *, announce=True):
    for name, value in host.items():
        program = program.replace(name, value)
    return f"{program}\nprint(42)" if announce else program


def still_works(reward):
    """The sandbox, or the one in its place, shows nothing of what ran there before."""
    sandbox = reward._programs
    sandbox.limits, limits = PATIENT, sandbox.limits
    look = """if True:  # where the tests' own environment is below /tmp, its libraries are there inside, too
        import os, sys
        libraries = {name for path in sys.path for name in path.split("/")[2:3] if path.startswith("/tmp/")}
        print(set(os.listdir("/tmp")) - libraries, len([p for p in os.listdir("/proc") if p.isdigit()]), 6 * 7)
    """
    outcome = sandbox.run(look)
    sandbox.limits = limits
    return outcome == Outcome("exit", 0, "set() 2 42\n")


@sandboxed
def test_hostile_scripts_score_0_and_harm_nobody(host):
    before, alive = mounts(), set(sandbox_processes())  # other tests' sandbox lives as long as this file's tests
    costly = CodeReward(CodeConfig(wall_s=1.0))
    quick = CodeReward(CodeConfig(wall_s=30.0))
    neighbour = Sandbox(PATIENT)
    metadata = {"tests": {"inputs": ["SECRET"], "outputs": ["42\n"]}}
    try:
        for reward, programs in ((quick, PROBES), (costly, COSTLY)):
            for name, program in programs.items():
                assert reward(block(armed(program, host)), [], metadata) == 0.0, name
                assert still_works(reward), name
                assert neighbour.run("print(42)").output == "42\n", name
        assert neighbour.starts == 1
        assert quick("```\nprint(42)\n```", [], metadata) == 1.0, "so an attack that succeeds would have been seen"
    finally:
        for part in (costly, quick, neighbour):
            part.close()
    assert mounts() == before and not left_over(alive)


@sandboxed
@pytest.mark.parametrize("tests", [["assert f(3) == 'expected'"], {"fn_name": "f", "inputs": [[3]], "outputs": ["expected"]}])
def test_a_program_cannot_forge_what_its_tests_see(tests):
    alive, reward = set(sandbox_processes()), CodeReward(CodeConfig(wall_s=3.0))
    for name, program in FORGERS.items():
        assert reward(block(program), [], {"tests": tests}) == 0.0, name
        assert still_works(reward), name
    reward.close()
    assert not left_over(alive)


@sandboxed
@pytest.mark.slow
def test_a_thousand_hostile_programs_leave_nothing(host):
    before, files, alive = mounts(), set(os.listdir("/tmp")), set(sandbox_processes())
    programs = [armed(p, host) for p in (PROBES | COSTLY).values()]
    reward = CodeReward(CodeConfig(wall_s=0.3))
    drawn = random.Random(0).choices(programs, k=1000)
    scores = [reward(block(p), [], {"tests": {"inputs": [""], "outputs": ["42\n"]}}) for p in drawn]
    assert scores == [0.0] * 1000 and still_works(reward)
    descriptors = len(os.listdir("/proc/self/fd"))
    reward.close()
    assert descriptors < 100 and mounts() == before and not left_over(alive)
    assert not [name for name in set(os.listdir("/tmp")) - files if name.startswith("pmpo-")]


def mounts():
    return Path("/proc/self/mounts").read_text()


def left_over(before):
    """Processes of sandboxes of this process that were not there ``before``, once they have had time to end."""
    for _ in range(100):
        new = set(sandbox_processes()) - before
        if not new:
            break
        time.sleep(0.1)
    return new


def sandbox_processes():
    for path in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in path.read_text().splitlines())
            parents = []
            while fields["PPid"].strip() not in ("0", "1"):
                parents.append(fields["PPid"].strip())
                parent = Path(f"/proc/{parents[-1]}/status").read_text()
                fields |= dict(line.split(":", 1) for line in parent.splitlines() if line.startswith("PPid"))
            users = {int(user) for user in fields["Uid"].split()}
        except OSError:
            continue
        if os.getuid() == 0 and users & own_users() or str(os.getpid()) in parents and fields["Name"].strip() == "bwrap":
            yield int(path.parent.name)


def own_users():
    ids = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
    half = max(int(first) + int(length) for first, _, length in ids) // 2
    return {half + (os.getpid() * 64 + number) % (half - 2) for number in range(64)}


@sandboxed
def test_a_sandbox_ends_with_the_process_that_made_it():
    program = (
        "from pmpo_megatron.rewards.sandbox.box import Limits, Sandbox\nsandbox = Sandbox(Limits())\n"
        "talk = sandbox.answer_calls('import time\\ndef f(): time.sleep(99)')\n"
        "print(sandbox._process.pid, flush=True)\ntalk.hear()"
    )
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=env) as main:
        outer = int(main.stdout.readline())
        inner = [p.parent for p in Path("/proc").glob("[0-9]*/stat") if parent_of(p) == outer]
        assert inner, "process 1 of the namespace"
        main.kill()
    deadline = time.monotonic() + 60
    while any(path.exists() for path in inner) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(path.exists() for path in inner)


def parent_of(stat):
    try:
        return int(stat.read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return None


@sandboxed
@pytest.mark.skipif(os.getuid() != 0, reason="an ordinary user has no other")
def test_an_ordinary_user_gets_the_same_walls():
    """As user 65534, with the system's Python, since the one of this environment may lie in root's home."""
    if not os.access("/usr/bin/python3", os.X_OK):
        pytest.skip("no /usr/bin/python3")
    import pmpo_megatron.rewards.sandbox.box as box

    command = box.bubblewrap(0, 0)
    start = command.index(os.path.realpath(sys.executable))
    for path in (os.path.realpath(sys.base_prefix), box.sysconfig.get_path("purelib")):
        at = command.index(path, command.index("--tmpfs")) if path in command else None
        while at is not None and command[at - 1] != "--ro-bind":
            at = command.index(path, at + 1)
        if at is not None:
            del command[at - 1 : at + 2]
            start -= 3
    seccomp = box.filter_file()
    command[command.index("--seccomp") + 1] = str(seccomp)
    with open(box.INSIDE / "zygote.py") as zygote:
        assert zygote.readable()
    shared = shutil.copytree(box.INSIDE, "/tmp/pmpo-inside-for-a-test", dirs_exist_ok=True)
    command = [shared if part == str(box.INSIDE) else part for part in command]
    command[start] = "/usr/bin/python3"
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=[seccomp],
        text=True,
        user=65534,
        group=65534,
        extra_groups=[],
        env={"PATH": "/usr/bin"},
        cwd="/",
    )
    try:
        os.close(seccomp)
        assert json.loads(process.stdout.readline() or "0") == {"ready": True}, process.stderr.read()
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(shared)


def test_without_bubblewrap_the_run_refuses_and_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"rewards.code.*apt-get install bubblewrap.*isolation=unsandboxed"):
        check_sandbox(CodeConfig())
    check_sandbox(CodeConfig(isolation="unsandboxed"))


def test_where_namespaces_are_refused_the_run_refuses_and_says_what_to_allow(monkeypatch, tmp_path):
    bwrap = tmp_path / "bwrap"
    bwrap.write_text("#!/bin/sh\necho 'bwrap: setting up uid map: Permission denied' >&2\nexit 1\n")
    bwrap.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"setting up uid map: Permission denied.*apparmor_restrict_unprivileged_userns=0"):
        check_sandbox(CodeConfig())


def test_unsandboxed_runs_the_same_programs():
    reward = CodeReward(CodeConfig(isolation="unsandboxed", wall_s=120.0))
    for program, metadata in CASES.values():
        assert reward(block(program.format("+")), [], metadata) == 1.0
        assert reward(block(program.format("-")), [], metadata) == 0.0
    reward.close()


@pytest.mark.parametrize(
    "response, program",
    [
        ("```python\na\n```\nand\n```\nb\n```", "b\n"),
        ("```python\na\n```\nprints\n```text\n3\n```", "a\n"),
        ("```py\na\n``` ", "a\n"),
        ("  ```Python title=x\na\n  ```", "a\n"),
        ("```python\na\n", None),
        ("a", None),
        ("```python a```", None),
        ("```python\n```", ""),
    ],
)
def test_the_last_closed_block_is_the_program(response, program):
    assert last_program(response) == program


@pytest.mark.parametrize(
    "output, expected, same",
    [
        ("3\n", "3", True),
        ("3 \n\n", "3\n", True),
        ("3\n4", "3 4", False),
        ("", "3", False),
        ("3", "", False),
        ("0.3333333", "0.33333333", True),
        ("0.34", "0.33", False),
        ("3.0", "3", False),
        ("3", "3.0", True),
        ("nan", "1.5", False),
        ("1_0.5", "10.5", True),
        ("yes", "YES", False),
        ("100000000000000001", "100000000000000002", False),
    ],
)
def test_outputs(output, expected, same):
    assert same_output(output, expected) is same


@pytest.mark.parametrize(
    "value, expected, same",
    [
        (True, 1, False),
        (1, True, False),
        (0.1 + 0.2, 0.3, True),
        (3, 3.0, True),
        ((1, 2), [1, 2], True),
        ([1, 2], [1, 2, 3], False),
        ({1: "a"}, {"1": "a"}, True),
        ("1", 1, False),
        (None, None, True),
        (float("nan"), 1.0, False),
        ({1, 2}, [1, 2], False),
    ],
)
def test_values(value, expected, same):
    assert same_value(value, expected) is same


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"tests": []},
        {"tests": {"inputs": ["1"], "outputs": [""]}},
        {"tests": {"inputs": [], "outputs": []}},
        {"tests": {"inputs": ["1"], "outputs": ["1", "2"]}},
        {"tests": {"inputs": [[1]], "outputs": [1]}},
        {"tests": "assert 1 == 1"},
        {"tests": "assert f(1 =="},
        {"tests": 3},
    ],
)
def test_rows_without_usable_tests_are_named(metadata):
    with pytest.raises(ValueError):
        read_tests(metadata)


def test_plain_data_travels_and_nothing_else():
    value = {"a": [1, (2.5, None)], 3: {4}, (5,): b"6", "z": 1j, "t": True}
    assert decode(json.loads(json.dumps(encode(value)))) == value
    for wrong in ({"bytes": 10**9}, {"tuple": {"dict": []}}, {"eval": []}, {"tuple": [], "set": []}, {"set": [[1]]}):
        with pytest.raises((ValueError, TypeError)):
            decode(wrong)
    with pytest.raises(TypeError):
        encode(object())


@pytest.mark.skipif(not Path("/usr/include/asm-generic/unistd.h").is_file(), reason="no kernel headers")
def test_numbers_of_system_calls_are_the_kernels():
    pattern = r"#define __NR(?:3264)?_+(\w+)\s+(\d+)"
    common = dict(re.findall(pattern, Path("/usr/include/asm-generic/unistd.h").read_text()))
    for name, numbers in REFUSED.items():
        assert numbers[1] is None or int(common[name]) == numbers[1], name
    assert len(filter_program("aarch64")) % 8 == 0


@sandboxed
def test_the_pool_hands_each_row_its_own_tests():
    with RewardPool("code", workers=2, timeout=200.0, code=CodeConfig(wall_s=120.0)) as pool:
        rows = [{"tests": {"inputs": ["1 2"], "outputs": [str(total)]}} for total in (3, 4)] + [{}]
        assert pool.score([block(ADD.format("+"))] * 3, [[]] * 3, rows) == [1.0, 0.0, 0.0]
        assert list(pool.stats.errors.values()) == [1], "a row without tests is counted"
