#!/usr/bin/env bash
# run-once.sh BOARD: one runner for one job, from a fresh copy of the runner's files. Started by recipes-runner@.service
# when somebody has put a just-in-time configuration into $state/jit/BOARD; that file is used once and gone.
set -euo pipefail

board=${1:?which board?}
program=${RECIPES_RUNNER_PROGRAM:-/opt/recipes-runner/current}
state=${RECIPES_RUNNER_STATE:-/var/lib/recipes-runner}
quarantine=${RECIPES_QUARANTINE:-$state/quarantine}

if [ -e "$quarantine" ]; then
    echo "in quarantine, no runner is started: $quarantine" >&2
    exit 4
fi
config=$(cat "$state/jit/$board")
rm -f "$state/jit/$board" # it registers one runner; whoever reads it later shall find nothing

home=$(mktemp -d "$state/work/$board.XXXXXX")
trap 'rm -rf "$home"' EXIT # every job's checkout, environment and caches of this folder end with it
cp -R "$program/." "$home/"
cd "$home"
# In the environment, where only this user can read it, and not on the command line, where everybody can. The runner
# takes every ACTIONS_RUNNER_INPUT_* for the option of that name, and drops it before a job begins.
HOME=$home ACTIONS_RUNNER_INPUT_JITCONFIG=$config ./run.sh &
runner=$!
trap 'kill -INT $runner 2>/dev/null || true' INT TERM
wait $runner || wait $runner # a signal ends the first wait, not the runner
