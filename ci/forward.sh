#!/usr/bin/env bash
# ci/forward.sh WORD...: runs `recipe WORD...`, where a word in capitals is one of make's variables, handed over as
# environment: NAME, BOARD, RUN and ARGS stand for their words, every other one that is set for its flag and its value.
# Prints the command as it could be typed, and becomes it. Nothing in a value is evaluated.
set -euf -o pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

command=(.venv/bin/recipe)
for word in "$@"; do
    if [[ ! $word =~ ^[A-Z_]+$ ]]; then
        command+=("$word")
        continue
    fi
    value=${!word:-}
    [ -n "$value" ] || continue
    flag=--${word,,}
    flag=${flag//_/-}
    [ "$word" != DRY ] || flag=--dry-run
    case $word=$value in
    NAME=* | BOARD=* | RUN=*) command+=("$value") ;;
    ARGS=*) for item in $value; do command+=("$item"); done ;; # split at blanks: a value with one goes to `recipe` itself
    SET=* | MAP=*) for item in $value; do command+=("$flag" "$item"); done ;;
    CONTAINER=0) command+=(--no-container) ;;
    BASE=0 | BUILD=0 | DRY=0 | UPGRADE=0) ;;
    CONTAINER=1 | BASE=1 | BUILD=1 | DRY=1 | UPGRADE=1) command+=("$flag") ;;
    CONTAINER=* | BASE=* | BUILD=* | DRY=* | UPGRADE=*) echo "make: $word=$value: say 1 or 0" >&2 && exit 2 ;;
    *) command+=("$flag" "$value") ;;
    esac
done

printf '+'
printf ' %q' "${command[@]}"
printf '\n'
exec "${command[@]}"
