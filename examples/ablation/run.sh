#!/usr/bin/env bash
# Compares objectives over seeds on generated arithmetic, with equal budgets, and makes one report (examples/ablation/study.yaml).
#
#   bash examples/ablation/run.sh [--only LEVEL ...] [--seeds N] [--rounds N] [--jobs N] [--out DIR] [--report-only]
#
# Killed anywhere, the same command goes on; DIR/results.csv alone is enough to go on elsewhere. --only, --seeds and --rounds
# make pieces: --only pmpo gmpo --seeds 1. See docs/benchmarks.md for what the studies found, and in what time.
source "$(dirname "${BASH_SOURCE[0]}")/../common/study.sh"
