"""``pmpo-train``: reads a configuration, checks it, starts the parts and runs the trainer."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from pmpo_megatron.training.launch import (
    StopRequest,
    quiet_libraries,
    rank_environment,
    run_command,
    set_up_logging,
    world_size_of_environment,
)

if TYPE_CHECKING:
    from pmpo_megatron.training.run_config import RunConfig

# Imports that take seconds are in the functions that need them: `main` answers an interrupt from its first moment on.
logger = logging.getLogger("pmpo_megatron.commands.train")  # also where this file is run as __main__


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="pmpo-train",
        description="Trains a model with PMPO (arXiv 2601.22521) on Megatron-Core with vLLM rollouts.",
        epilog="Several processes: torchrun --nproc-per-node N -m pmpo_megatron.commands.train --config run.yaml "
        "key.path=value ... A run that stopped goes on when the same command is given again.",
    )
    parser.add_argument("--config", type=Path, help="YAML file with a section per concern")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override of one field, read as YAML")
    parser.add_argument("--print-config", action="store_true", help="print every field with default and meaning, and stop")
    parser.add_argument("--dry-run", action="store_true", help="check everything that can be checked without starting")
    parser.add_argument("--world-size", type=int, help="processes to assume for --dry-run (default: torchrun's, or 1)")
    parser.add_argument("--hardware", help="GPUs to assume for --dry-run (default: this machine's; without any, h100-80gb)")
    return parser.parse_args(arguments)


def load_config(options: argparse.Namespace) -> RunConfig:
    from pmpo_megatron.config import apply_overrides, build, read_yaml
    from pmpo_megatron.training.run_config import RunConfig

    values = read_yaml(options.config) if options.config else {}
    return build(RunConfig, apply_overrides(values, options.overrides))


def print_config(options: argparse.Namespace) -> None:
    """The reference without a file; with one, the values that a run of it would use."""
    import yaml

    from pmpo_megatron.config import describe, to_plain
    from pmpo_megatron.training.run_config import RunConfig

    if options.config:
        print(yaml.safe_dump(to_plain(load_config(options)), sort_keys=False), end="")
        return
    for name, kind, default, meaning in describe(RunConfig):
        print(f"{name}: {default}  # {kind}. {meaning}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``pmpo-train``; the exit code: 0 done or stopped on request, 2 bad input, 1 failed, 130 interrupted."""
    return run_command(lambda: command(parse(arguments)))


def command(options: argparse.Namespace) -> int:
    if options.print_config:
        print_config(options)
        return 0
    quiet_libraries()  # before any of them is imported
    from pmpo_megatron.planner import hardware_named, memory_report
    from pmpo_megatron.training.checks import check_run

    config = load_config(options)
    if options.dry_run:
        world_size = options.world_size if options.world_size is not None else world_size_of_environment()
        hardware = hardware_named(options.hardware) if options.hardware else None
        for line in [*check_run(config, world_size, dry_run=True).lines, *memory_report(config, world_size, hardware)]:
            print(line)
        print("dry run: nothing wrong found")
        return 0
    from pmpo_megatron.parallel.processes import end_with_launcher

    end_with_launcher()
    rank, world_size = rank_environment()
    set_up_logging(rank)
    checked = check_run(config, world_size)
    for line in [*checked.lines, *memory_report(config, world_size)]:
        logger.info("%s", line)
    prompts = checked.prompts if rank == 0 else {}
    del checked  # no other rank keeps prompts
    from pmpo_megatron.checkpoint.run_lock import RunLock
    from pmpo_megatron.training.assembly import run  # imports Megatron and vLLM's client: not needed to check or to print

    with closing(RunLock(config.run.directory)) if rank == 0 else nullcontext():
        return run(config, StopRequest().install(), prompts)


if __name__ == "__main__":
    raise SystemExit(main())
