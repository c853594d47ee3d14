"""Converts a Megatron checkpoint, or a run's, to a Hugging Face directory. See docs/checkpoints.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pmpo_megatron.commands.convert import add_options, options_of, run
from pmpo_megatron.convert import megatron_to_hf


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        help="what convert_hf_to_megatron.py wrote, or a checkpoint of a run (RUN/checkpoints/round-...), whose weights "
        "are taken and whose optimizer is left",
    )
    add_options(parser)
    parser.add_argument(
        "--hf", type=Path, help="directory of the same model that gives config.json and tokenizer (default: CHECKPOINT/hf)"
    )
    parser.add_argument("--shard-gib", type=float, default=4.0, metavar="GIB", help="largest file (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.shard_gib <= 0:
        parser.error(f"--shard-gib {arguments.shard_gib:g} must be above 0")
    shard_bytes = int(arguments.shard_gib * 2**30)
    options = options_of(arguments)
    return run(lambda: megatron_to_hf(arguments.checkpoint, arguments.out, options, hf=arguments.hf, shard_bytes=shard_bytes))


if __name__ == "__main__":
    sys.exit(main())
