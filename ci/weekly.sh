#!/usr/bin/env bash
# ci/weekly.sh: one whole recipe on a CPU, verified, graded where its figures are recorded, and opened by other software.
#
#   NAME=recipe HW=cpu [STEPS=20] [GRADE=1] [OUT=folder] ci/weekly.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${NAME:?which recipe?}" "${HW:?on what?}"

out=${OUT:-runs}
.venv/bin/recipe run "$NAME" --hw "$HW" --resume never --out "$out" ${STEPS:+--steps "$STEPS"}
runs=("$out"/*-"$NAME"-"$HW"-*) # names begin with the time: the last one is the newest
run=${runs[-1]}
.venv/bin/recipe verify run "$run"
if [ -n "${GRADE:-}" ]; then
    .venv/bin/recipe grade "$run"
else
    echo "weekly: $NAME has no figures on $HW of the recipe as it stands; nothing to grade by"
fi
# A line and a row for each reader; 6 where one opens the export and computes something else.
.venv/bin/recipe export "$run" --readers
