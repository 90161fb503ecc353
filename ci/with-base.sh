#!/usr/bin/env bash
# ci/with-base.sh COMMAND...: runs a command that builds images, with BASE_IMAGE naming a base that can be had here.
#
#   BASE_IMAGE, where it is set and an engine answers
#   the base of docker/images.lock.json, where the engine has it or a registry gives it
#   else recipes-base:bookworm, made by ci/engine.sh (as root) from Debian's signed packages; the engine too, if need be
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

locked=$(python3 -c 'import json
base = json.load(open("docker/images.lock.json"))["pins"]["cpu"]["base"]
print("%(image)s@%(digest)s" % base if base["digest"] else "")')

can_be_had() { # IMAGE: fetched if need be; Docker itself gives up on a registry that does not answer
    [ -n "$1" ] && { docker image inspect "$1" >/dev/null 2>&1 || docker pull --quiet "$1" >/dev/null; }
}

if ! docker info >/dev/null 2>&1 || { [ -z "${BASE_IMAGE:-}" ] && ! can_be_had "$locked"; }; then
    echo "base: no engine answers, or it cannot get ${locked:-a base: the lock has none}; making one of Debian's packages"
    as_root=()
    [ "$(id -u)" = 0 ] || as_root=(sudo)
    "${as_root[@]}" ci/engine.sh
    BASE_IMAGE=recipes-base:bookworm
fi
export BASE_IMAGE=${BASE_IMAGE:-$locked}
echo "base: $BASE_IMAGE"
exec "$@"
