#!/usr/bin/env bash
# ci/golden.sh: twenty steps of a small model on a CPU, graded against the recipe's results.yaml; seconds, and code 6
# where a figure fails. On the kind of CPU that the entry is of, with its lock, every bit must be the same; elsewhere the
# entry's band decides. OUT is the folder of the run (default: a temporary one).
#
# To record new figures: run this with OUT set, then `recipe grade --record` with the run's folder, and make docs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=${OUT:-$(mktemp -d)}
[ -n "${OUT:-}" ] || trap 'rm -rf "$out"' EXIT

.venv/bin/recipe run nano-transformer-scratch --hw cpu --steps 20 --resume never --out "$out" \
    --set training_config.precision=fp32 --set device_config.threads=1 \
    --set eval_config.max_rows=32 --set eval_config.max_new_tokens=1
runs=("$out"/*-nano-transformer-scratch-cpu-*)
.venv/bin/recipe grade "${runs[-1]}"
