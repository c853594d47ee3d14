#!/usr/bin/env bash
# Trains one tiny model on three generated domains, together and apart, with three objectives, and makes one report by domain (examples/domains/study.yaml).
#
#   bash examples/domains/run.sh [--only LEVEL ...] [--seeds N] [--rounds N] [--jobs N] [--out DIR] [--report-only]
#
# Killed anywhere, the same command goes on; DIR/results.csv alone is enough to go on elsewhere. --only, --seeds and --rounds
# make pieces: --only pmpo/mixture grpo/mixture --seeds 1. Programs run in the sandbox, which needs bubblewrap.
start_model=(runs/domains-model --tasks arithmetic=4 programs=2,3 choices=1,2,3 --vocabulary 600 --steps 1500)
source "$(dirname "${BASH_SOURCE[0]}")/../common/study.sh"
