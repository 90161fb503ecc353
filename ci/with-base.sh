#!/usr/bin/env bash
# ci/with-base.sh COMMAND...: runs a command that builds images, with BASE_IMAGE naming a base that can be had here.
#
#   BASE_IMAGE, where it is set and an engine answers
#   the base of docker/images.lock.json, once that has a digest
#   else recipes-base:bookworm, made by ci/engine.sh (as root) from Debian's signed packages; the engine too, if need be
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

locked=$(python3 -c 'import json
base = json.load(open("docker/images.lock.json"))["pins"]["cpu"]["base"]
print("%(image)s@%(digest)s" % base if base["digest"] else "")')

if ! docker info >/dev/null 2>&1 || [ -z "${BASE_IMAGE:-$locked}" ]; then
    echo "base: docker/images.lock.json has no digest of one, or no engine answers; making one of Debian's packages"
    as_root=()
    [ "$(id -u)" = 0 ] || as_root=(sudo)
    "${as_root[@]}" ci/engine.sh
    BASE_IMAGE=recipes-base:bookworm
fi
export BASE_IMAGE=${BASE_IMAGE:-$locked}
echo "base: $BASE_IMAGE"
exec "$@"
