"""Prints and plots p, ESS and clip fraction against trajectory length, from the runs that run.sh made.

python examples/long_trajectory/table.py runs/long_trajectory [--out FILE.svg]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from pmpo_megatron.errors import PmpoError
from pmpo_megatron.monitor.read import read_run

QUANTITIES = ("p", "ess_fraction", "clip_fraction")


def by_length(root: Path) -> dict[int, dict[str, np.ndarray]]:
    """For each run, whose directory is its length: the quantities of all trajectories whose tokens were clipped somewhere."""
    found = {}
    for directory in sorted((path for path in root.iterdir() if path.name.isdigit()), key=lambda path: int(path.name)):
        records = read_run(directory).trajectories
        values = {
            name: np.concatenate([record[name] for record in records]) for name in ("p", "ess", "clip_fraction", "length")
        }
        values["ess_fraction"] = values["ess"] / values["length"]
        stale = values["clip_fraction"] > 0  # a round's first step is on-policy: p is 1 there whatever the length
        found[int(directory.name)] = {name: values[name][stale] for name in QUANTITIES}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--out", type=Path, help="also plot into this SVG")
    options = parser.parse_args()
    try:
        found = by_length(options.root)
    except (PmpoError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("tokens  trajectories  " + "  ".join(f"{name:>22}" for name in QUANTITIES) + "   (mean, standard deviation)")
    for length, values in found.items():
        cells = [
            f"{values[name].mean():12.4f} {values[name].std():9.4f}" if len(values[name]) else " " * 22 for name in QUANTITIES
        ]
        print(f"{length:6d}  {len(values['p']):12d}  " + "  ".join(cells))
    if options.out:
        plot(found, options.out)
    return 0


def plot(found: dict[int, dict[str, np.ndarray]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, plots = pyplot.subplots(1, 3, figsize=(10, 3), layout="constrained")
    for axes, name in zip(plots, QUANTITIES, strict=True):
        for length, values in found.items():
            axes.plot(np.full(len(values[name]), length), values[name], ".", color="C0", alpha=0.3)
        axes.plot(list(found), [values[name].mean() if len(values[name]) else np.nan for values in found.values()], "k_-")
        axes.set(xscale="log", xlabel="tokens", title=name.replace("_", " "))
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    raise SystemExit(main())
