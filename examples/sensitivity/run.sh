#!/usr/bin/env bash
# Maps what PMPO's ess_target, clip_reference and clip bound do, as heat maps with equal budgets (examples/sensitivity/study.yaml).
#
#   bash examples/sensitivity/run.sh [--only LEVEL ...] [--seeds N] [--rounds N] [--jobs N] [--out DIR] [--report-only]
#
# Killed anywhere, the same command goes on; DIR/results.csv alone is enough to go on elsewhere. --only, --seeds and --rounds
# make pieces: --only 0.95 0.98 --seeds 1. See docs/benchmarks.md for what the studies found, and in what time.
source "$(dirname "${BASH_SOURCE[0]}")/../common/study.sh"
