"""Converts a Hugging Face checkpoint to a Megatron checkpoint that loads on any parallel layout. See docs/checkpoints.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pmpo_megatron.commands.convert import add_options, options_of, run
from pmpo_megatron.convert import hf_to_megatron


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hf", type=Path, required=True, help="directory with config.json, tokenizer and *.safetensors")
    add_options(parser)
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="also read pytorch_model*.bin (tensors only, no code in them is run) where there are no safetensors",
    )
    arguments = parser.parse_args()
    return run(lambda: hf_to_megatron(arguments.hf, arguments.out, options_of(arguments), allow_pickle=arguments.allow_pickle))


if __name__ == "__main__":
    sys.exit(main())
