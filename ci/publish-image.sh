#!/usr/bin/env bash
# ci/publish-image.sh: logs in to the registry for as long as a push takes, and prints `digest=...`. The login lies in a
# folder of its own, which goes with this script.
#
#   TARGET=cpu REPOSITORY=ghcr.io/owner/name ACTOR=user GH_TOKEN=may write packages
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${TARGET:?}" "${REPOSITORY:?}" "${ACTOR:?}" "${GH_TOKEN:?}"

DOCKER_CONFIG=$(mktemp -d)
export DOCKER_CONFIG
trap 'rm -rf "$DOCKER_CONFIG"' EXIT
docker login "${REPOSITORY%%/*}" --username "$ACTOR" --password-stdin <<<"$GH_TOKEN" >&2
.venv/bin/recipe image publish "$TARGET" --to "$REPOSITORY" --no-rebuild --replace >&2
python3 -c 'import json, sys
print("digest=" + json.load(open("docker/images.lock.json"))["targets"][sys.argv[1]]["digest"])' "$TARGET"
