#!/usr/bin/env bash
# The runner runs this before a job, and no pull request can change it: ACTIONS_RUNNER_HOOK_JOB_STARTED. Any code but 0
# and the job does not run. It refuses
#
#   another workflow than ours at main (RECIPES_RUNNER_WORKFLOW=owner/name/.github/workflows/hardware.yml), or a pull
#   request's event: a second lock behind the runner group's
#   a machine in quarantine (RECIPES_QUARANTINE); a person removes that file
#   a board that a process holds, or that somebody has the lease of
#
# It looks at files only and opens no device. RECIPES_SYSFS_ROOT is a prefix of /proc and /run, for tests.
# Never run beside a card.
set -euo pipefail

root=${RECIPES_SYSFS_ROOT:-}
quarantine=${RECIPES_QUARANTINE:-/var/lib/recipes-runner/quarantine}

refuse() { # WHAT TODO
    printf 'this machine takes no job: %s\n  to do: %s\n' "$1" "$2" >&2
    exit 4
}

wanted=${RECIPES_RUNNER_WORKFLOW:?the one workflow that this runner serves}@refs/heads/main
[ "${GITHUB_WORKFLOW_REF:-}" = "$wanted" ] ||
    refuse "the workflow is ${GITHUB_WORKFLOW_REF:-unknown}, not $wanted" "limit the runner group to that workflow"
case ${GITHUB_EVENT_NAME:-} in
schedule | workflow_dispatch) ;;
*) refuse "the event is ${GITHUB_EVENT_NAME:-unknown}" "start hardware.yml by hand, or by a maintainer's label" ;;
esac

if [ -e "$quarantine" ]; then
    refuse "it is in quarantine ($quarantine): $(tr '\n' ' ' <"$quarantine")" \
        "look at the board; when it is well again, remove that file"
fi

shopt -s nullglob
for pids in "$root"/proc/driver/tenstorrent/*/pids; do
    holders=$(tr -s '[:space:]' ' ' <"$pids")
    [ -z "${holders// /}" ] || refuse "node $(basename "$(dirname "$pids")") is held by the processes $holders" "end them"
done
for lease in "$root"/run/lock/recipes-*.lock; do
    # Opened here, as `flock FILE` would also make the file, which a kernel refuses for another user's in /run/lock.
    if ! { exec 8<"$lease"; } 2>/dev/null; then
        refuse "the lease $(basename "$lease") cannot be opened" "look at $lease: every user of the board must read it"
    elif ! flock --shared --nonblock 8; then
        refuse "the lease $(basename "$lease") is taken: $(head -c 300 "$lease")" "wait for that run, or: recipe stop"
    fi
    exec 8<&-
done
echo "free: no quarantine, no holder, no lease"
