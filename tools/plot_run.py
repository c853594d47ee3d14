#!/usr/bin/env python3
"""Makes one self-contained HTML report of one run, or of several overlaid.

python tools/plot_run.py runs/first runs/second --out comparison.html
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pmpo_megatron.errors import PmpoError
from pmpo_megatron.monitor.report import write_report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's directory (run.directory of its config)")
    parser.add_argument("--out", type=Path, help="the page; default: report.html in the first run's directory")
    parser.add_argument("--title", help="heading of the page; default: the runs' names")
    options = parser.parse_args()
    try:
        written = write_report(options.runs, options.out or options.runs[0] / "report.html", title=options.title)
    except PmpoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"report: {written.resolve().as_uri()}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
