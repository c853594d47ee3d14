"""What the two command lines share: options, a progress bar, errors as one line."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

from pmpo_megatron.convert.conversion import DTYPES, Options, Summary
from pmpo_megatron.errors import PmpoError
from pmpo_megatron.monitor.progress import show_progress


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="directory to write; complete or absent afterwards")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="of the tensors written; auto keeps each one's (default: %(default)s)"
    )
    parser.add_argument("--verify", action="store_true", help="read all tensors again and compare them before OUT appears")
    parser.add_argument("--force", action="store_true", help="replace a checkpoint that exists in OUT")


def options_of(arguments: argparse.Namespace) -> Options:
    return Options(dtype=arguments.dtype, verify=arguments.verify, force=arguments.force, follow=show_progress)


def run(convert: Callable[[], Summary]) -> int:
    """Runs a conversion and says how it went; returns the exit status."""
    started = time.monotonic()
    try:
        summary = convert()
    except PmpoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was left behind", file=sys.stderr)
        return 130
    seconds = time.monotonic() - started
    checked = ", every one read again and equal" if summary.verified else ""
    size = f"{summary.num_bytes / 1e9:.2f} GB" if summary.num_bytes > 1e8 else f"{summary.num_bytes / 1e6:.2f} MB"
    print(f"{summary.out}: {summary.tensors} tensors, {size} in {seconds:.1f} s{checked}")
    return 0
