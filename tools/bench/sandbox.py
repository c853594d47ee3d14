"""Programs per second that the sandbox of the reward `code` runs, warm and cold, with the machine's load."""

from __future__ import annotations

import argparse
import os
import time
from concurrent.futures import ThreadPoolExecutor

from pmpo_megatron.rewards.sandbox.box import Limits, Sandbox

PROGRAM = """
def primes(n):
    found = []
    for k in range(2, n + 1):
        if all(k % p for p in found if p * p <= k):
            found.append(k)
    return found

print(len(primes(int(input()))))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--programs", type=int, default=200, help="runs of each worker (default: %(default)s)")
    options = parser.parse_args()
    print(f"load of the last minute {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors, {options.workers} workers")
    began = time.monotonic()
    sandboxes = [Sandbox(Limits(wall_s=60.0)) for _ in range(options.workers)]
    with ThreadPoolExecutor(options.workers) as threads:
        list(threads.map(lambda sandbox: run(sandbox, 1), sandboxes))
        print(f"start and first program: {time.monotonic() - began:.2f} s")
        began = time.monotonic()
        list(threads.map(lambda sandbox: run(sandbox, options.programs), sandboxes))
        print(f"warm: {options.workers * options.programs / (time.monotonic() - began):.0f} runs/s")
    for sandbox in sandboxes:
        sandbox.close()
    began = time.monotonic()
    for _ in range(5):
        with Sandbox(Limits(wall_s=60.0)) as sandbox:
            run(sandbox, 1)
    print(f"cold, one worker: {5 / (time.monotonic() - began):.1f} runs/s")


def run(sandbox: Sandbox, programs: int) -> None:
    for _ in range(programs):
        outcome = sandbox.run(PROGRAM, "1000\n")
        if outcome.output != "168\n":
            raise SystemExit(f"a right program failed: {outcome}")


if __name__ == "__main__":
    main()
