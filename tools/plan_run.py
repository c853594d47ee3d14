#!/usr/bin/env python3
"""Plans a run: memory of every kind of GPU, communication, step time; says whether it fits and proposes better layouts.

python tools/plan_run.py --config examples/qwen2.5-32b/config.yaml --world-size 32 --hardware h100-80gb
python tools/plan_run.py --config run.yaml --world-size 16 parallel.tensor=4 model.recompute=selective

Nothing is started and no GPU is needed. The model's weights are not needed either: a config.json will do, and for
published models their name. Exit code: 0 fits, 1 does not, 2 bad input.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pmpo_megatron.config import apply_overrides, build, read_yaml
from pmpo_megatron.errors import ConfigError, PmpoError
from pmpo_megatron.planner import HARDWARE, best_engines, best_layouts, hardware_here, hardware_named, plan
from pmpo_megatron.planner.text import engines_settings, layout_text, plan_lines
from pmpo_megatron.training.run_config import RunConfig


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the run")
    parser.add_argument("--world-size", type=int, default=8, help="GPUs of the trainer (default: %(default)s)")
    parser.add_argument("--hardware", choices=sorted(HARDWARE), help="default: this machine's GPUs; without any, h100-80gb")
    parser.add_argument(
        "--sequence-length", type=int, metavar="TOKENS", help="mean trajectory, with its prompt (default: half of the longest)"
    )
    parser.add_argument("--proposals", type=int, default=3, help="layouts to propose; 0: none (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override of one field, read as YAML")
    return parser.parse_intermixed_args()


def proposals(options: argparse.Namespace, config: RunConfig, hardware) -> list[str]:
    if not options.proposals:
        return []
    found = best_layouts(config, options.world_size, hardware, sequence=options.sequence_length, count=options.proposals)
    if not found:
        return ["proposals: none of the layouts tried fits"]
    lines = ["proposals, fastest training first:"] + [
        f"  {layout_text(p.config, p.world_size)}: log-probs and steps {p.round.training:.0f} s per round, "
        f"{p.fullest.spare / 2**30:.1f} GiB to spare"
        for p in found
    ]
    return lines + engine_proposals(options, config, hardware)


def engine_proposals(options: argparse.Namespace, config: RunConfig, hardware) -> list[str]:
    try:
        found = best_engines(config, options.world_size, hardware, sequence=options.sequence_length, count=options.proposals)
    except ConfigError:  # the layout itself cannot be
        return []
    return ["engines and memory by turns, shortest rounds first:"] * bool(found) + [f"  {engines_settings(p)}" for p in found]


def check(options: argparse.Namespace) -> None:
    for name, least in (("world_size", 1), ("sequence_length", 1), ("proposals", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')}", f"{value} must be at least {least}")


def main() -> int:
    options = parse()
    try:
        check(options)
        hardware = hardware_named(options.hardware) if options.hardware else hardware_here()
        config = build(RunConfig, apply_overrides(read_yaml(options.config), options.overrides))
        try:
            found = plan(config, options.world_size, hardware, sequence=options.sequence_length)
        except ConfigError as error:
            if error.field.startswith("parallel."):  # not this layout; which ones, then?
                print("\n".join(proposals(options, config, hardware)))
            raise
        print("\n".join([*plan_lines(found), *proposals(options, config, hardware)]))
    except PmpoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if found.fits else 1


if __name__ == "__main__":
    raise SystemExit(main())
