#!/usr/bin/env bash
# ci/trust.sh: the commit that boards will run, as `commit=...`: the one that was asked for by all of its 40 digits, else
# that of the workflow's own branch. A branch or a tag is refused: it may be another commit once somebody has approved it.
#
#   COMMIT=(40 digits, or empty) GITHUB_SHA=
set -euo pipefail

commit=${COMMIT:-${GITHUB_SHA:?}}
[[ $commit =~ ^[0-9a-f]{40}$ ]] || { echo "trust: '$commit' is no commit of 40 digits" >&2 && exit 2; }
echo "commit=$commit"
