#!/usr/bin/env bash
# ci/trust.sh: the commit that boards will run, as `commit=...`: the one that was asked for by all of its 40 digits, else
# that of the workflow's own branch. A branch or a tag is refused: it may be another commit once somebody has approved it.
#
# So is a workflow that is not protected main's, and a run of no board.
#
#   COMMIT=(40 digits, or empty) BOARDS="n150 n300" PROTECTED=true|false GITHUB_REF= GITHUB_SHA=
set -euo pipefail

die() { # the code of a usage error
    echo "trust: $*" >&2
    exit 2
}

commit=${COMMIT:-${GITHUB_SHA:?}}
[[ $commit =~ ^[0-9a-f]{40}$ ]] || die "'$commit' is no commit of 40 digits"
[ "${GITHUB_REF:?}" = refs/heads/main ] || die "boards run main's workflow, not that of $GITHUB_REF: dispatch it on main"
[ "${PROTECTED:-}" = true ] || die "main is not protected: see the repository's settings, and ci/README.md"
[ -n "${BOARDS:-}" ] || die "no board is in service: name one, or set the repository's variable TT_BOARDS (\"n150 n300\")"
echo "commit=$commit"
