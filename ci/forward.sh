#!/usr/bin/env bash
# ci/forward.sh VERB [ARGUMENT...]: turns make's variables, handed over as environment, into flags of `recipe`,
# prints the command as it could be typed, and becomes it. Values stay single words: nothing in them is evaluated.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

verb=$1
shift
command=(.venv/bin/recipe "$verb" "$@")

value() { # FLAG VARIABLE: adds `FLAG VALUE` where the variable is set
    [ -z "${!2:-}" ] || command+=("$1" "${!2}")
}

switch() { # FLAG VARIABLE [FLAG_FOR_0]: adds the flag for 1, the other one for 0
    case ${!2:-} in
    '') ;;
    1) command+=("$1") ;;
    0) [ -z "${3:-}" ] || command+=("$3") ;;
    *) echo "make: $2=${!2}: say 1 or 0" >&2 && exit 2 ;;
    esac
}

each() { # FLAG VARIABLE: one flag for each word of the variable (a value with a blank: `recipe` itself)
    local item
    set -f
    for item in ${!2:-}; do command+=("$1" "$item"); done
    set +f
}

case $verb in
run)
    value --hw HW
    value --steps STEPS
    value --stop-at STOP_AT
    value --resume RESUME
    each --set SET
    switch --container CONTAINER --no-container
    switch --dry-run DRY
    value --out OUT
    value --world WORLD
    ;;
new)
    value --from FROM
    value --data DATA
    each --map MAP
    ;;
plan)
    value --hw HW
    value --steps STEPS
    each --set SET
    ;;
data)
    value --hw HW
    each --set SET
    ;;
generate)
    value --prompt PROMPT
    switch --base BASE
    ;;
report)
    value --out OUT
    ;;
runs)
    set -f
    for item in ${RUNS:-}; do command+=("$item"); done
    set +f
    ;;
export)
    switch --check CHECK
    ;;
repro)
    value --out OUT
    ;;
grade)
    switch --record RECORD
    ;;
stop)
    value --hw HW
    ;;
verify)
    if [ -n "${RUN:-}" ]; then
        command+=(run "$RUN")
    elif [ "${CALIBRATE:-0}" != 0 ]; then
        command+=(calibrate)
    elif [ "${DDP:-0}" != 0 ]; then
        command+=(ddp)
        value --recipe NAME
        switch --weak WEAK
        value --world WORLD
        value --hw HW
    else
        command+=(board)
        value --hw HW
    fi
    ;;
doctor)
    value --hw HW
    switch --container CONTAINER --no-container
    ;;
image)
    value --base-image BASE_IMAGE
    value --wheelhouse WHEELHOUSE
    value --ca-bundle CA_BUNDLE
    [ -z "${HW:-}" ] || command+=("$HW")
    ;;
lock)
    switch --upgrade UPGRADE
    ;;
*)
    echo "ci/forward.sh: unknown verb $verb" >&2
    exit 2
    ;;
esac

printf '+'
printf ' %q' "${command[@]}"
printf '\n'
exec "${command[@]}"
