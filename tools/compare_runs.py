#!/usr/bin/env python3
"""Compares variants over seeds: runs in ROOT/<variant>/seed-<n> become one page with confidence bands and verdicts.

python tools/compare_runs.py runs/ablation --reference pmpo
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pmpo_megatron.errors import PmpoError
from pmpo_megatron.monitor.comparison import write_comparison


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, metavar="ROOT", help="directory of the variants")
    parser.add_argument("--reference", default="pmpo", help="variant that the others are compared with (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="the page (default: ROOT/report.html)")
    parser.add_argument("--title", default="Comparison of objectives", help="heading of the page (default: %(default)s)")
    options = parser.parse_args()
    out = options.out or options.root / "report.html"
    try:
        sentences = write_comparison(options.root, out, reference=options.reference, title=options.title)
    except PmpoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(sentences))
    print(f"report: {out.resolve().as_uri()}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
