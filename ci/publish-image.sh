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
.venv/bin/python -m ci.publish_image push
