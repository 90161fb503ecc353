#!/usr/bin/env bash
# The runner runs this after a job, whatever became of it: ACTIONS_RUNNER_HOOK_JOB_COMPLETED. Containers that the job left
# behind are asked to stop, which lets a run save and close its device, and are removed. The job's are those of this
# hook's own user: a container has its launcher's, and setup.sh gives a machine one runner. A person's run stays. What
# holds a node after that fails this hook; the next job is then refused by job-started.sh, and by its own preflight.
# Never run beside a card.
set -euo pipefail

root=${RECIPES_SYSFS_ROOT:-}
patience=${RECIPES_RUNNER_PATIENCE:-120} # seconds for a run to save, as `recipe stop` gives it

if command -v docker >/dev/null && docker info >/dev/null 2>&1; then
    own="$(id -u):$(id -g)"
    left=()
    containers=$(docker ps --all --quiet --filter label=training-recipes.run)
    for container in $containers; do
        user=$(docker inspect --format '{{.Config.User}}' "$container" 2>/dev/null) || continue # it has just gone
        [ "$user" != "$own" ] || left+=("$container")
    done
    if [ ${#left[@]} -gt 0 ]; then
        echo "left behind: ${left[*]}"
        docker stop --time "$patience" "${left[@]}" >/dev/null
        docker rm --force "${left[@]}" >/dev/null
    fi
fi

shopt -s nullglob
for pids in "$root"/proc/driver/tenstorrent/*/pids; do
    holders=$(tr -s '[:space:]' ' ' <"$pids")
    if [ -n "${holders// /}" ]; then
        echo "still held after the job: node $(basename "$(dirname "$pids")") by the processes $holders" >&2
        exit 4
    fi
done
echo "nothing of the job is left on the board"
