#!/usr/bin/env bash
# Compares fixed, scheduled and matched p under growing drift and mismatch: gradient norms, collapsed runs (examples/stability/study.yaml).
#
#   bash examples/stability/run.sh [--only LEVEL ...] [--seeds N] [--rounds N] [--jobs N] [--out DIR] [--report-only]
#
# Killed anywhere, the same command goes on; DIR/results.csv alone is enough to go on elsewhere. --only, --seeds and --rounds
# make pieces: --only ess/lr-5 p-1/lr-5 --seeds 1. See docs/benchmarks.md for what the studies found, and in what time.
source "$(dirname "${BASH_SOURCE[0]}")/../common/study.sh"
