#!/usr/bin/env bash
# Compares the round's modes over seeds with equal numbers of trajectories, and makes one report (examples/in_flight/study.yaml).
#
#   bash examples/in_flight/run.sh [--only LEVEL ...] [--seeds N] [--rounds N] [--jobs N] [--out DIR] [--report-only]
#
# Killed anywhere, the same command goes on; DIR/results.csv alone is enough to go on elsewhere. Give the engine a core of its
# own, or nothing runs beside anything: tools/bench/rollouts.py modes measures who waits, and for how long.
source "$(dirname "${BASH_SOURCE[0]}")/../common/study.sh"
