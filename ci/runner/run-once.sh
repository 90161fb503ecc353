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

home=$(mktemp -u "$state/work/$board.XXXXXX")
trap 'rm -rf "$home"' EXIT # every job's checkout, environment and caches of this folder end with it
mkdir -m 700 "$home"
# A stop of the unit reaches the runner as Ctrl-C in a terminal would: SIGINT to its whole process group. It has one of
# its own by `set -m`; without, a shell starts what is in the background with SIGINT ignored.
# We listen before it is started, and `$!` is its number from its start on. Until it has dropped our traps it may miss a
# SIGINT, and then finds the file `stopped`, which is there before any SIGINT is sent: no stop gets lost in between.
trap 'touch "$home/stopped"; [ -z "${!:-}" ] || kill -INT -- "-$!" 2>/dev/null || true' INT TERM
cp -R "$program/." "$home/"
cd "$home"
set -m
(
    trap - INT TERM
    [ ! -e stopped ] || exit 130
    # In the environment, where only this user can read it, and not on the command line, where everybody can. The runner
    # takes every ACTIONS_RUNNER_INPUT_* for the option of that name, and drops it before a job begins.
    HOME=$home ACTIONS_RUNNER_INPUT_JITCONFIG=$config exec ./run.sh
) &
runner=$!
while kill -0 $runner 2>/dev/null; do wait $runner || true; done # a signal ends the wait, not the runner
wait $runner
