"""``pmpo-rollout-node``: lets runs elsewhere start their vLLMs on this machine. See docs/rollouts.md, "Nodes of their own"."""

from __future__ import annotations

import argparse
import logging
import signal
import threading
from collections.abc import Sequence

from pmpo_megatron.errors import ConfigError
from pmpo_megatron.rollout.node_agent import NodeAgent
from pmpo_megatron.rollout.remote_process import read_key
from pmpo_megatron.training.launch import run_command, set_up_logging

logger = logging.getLogger("pmpo_megatron.commands.rollout_node")  # also where this file is run as __main__


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="pmpo-rollout-node",
        description="Waits for a run that has the key, starts the vLLMs that it asks for on this machine, and ends them with "
        "it; then for the next. The run names this machine in rollout.hosts, with rollout.nodes=own.",
    )
    add = parser.add_argument
    add("--key-file", required=True, help="file with the key, the same as the run's rollout.key_file; at least 16 bytes")
    add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: all (default: %(default)s)")
    add("--port", type=int, default=7400, help="(default: %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``pmpo-rollout-node``; returns the exit code: 0 asked to end, 2 bad input."""
    return run_command(lambda: command(parse(arguments)))


def command(options: argparse.Namespace) -> int:
    set_up_logging(0)
    asked = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked.set())
    try:
        key = read_key(options.key_file)
    except ConfigError as error:
        raise ConfigError("--key-file", error.problem) from None
    try:
        agent = NodeAgent(options.host, options.port, key)
    except OSError as error:
        raise ConfigError("--port", f"nothing can listen at {options.host}:{options.port}: {error.strerror}") from None
    logger.info("waiting for runs at %s:%d", agent.address.host, agent.address.port)
    asked.wait()
    agent.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
