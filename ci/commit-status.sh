#!/usr/bin/env bash
# ci/commit-status.sh: says on a commit, and so on its pull request, how its run on boards ended.
#
#   COMMIT= RESULT=success|failure|cancelled|skipped REPOSITORY=owner/name URL=of the run GH_TOKEN=may write statuses
set -euo pipefail
: "${COMMIT:?}" "${RESULT:?}" "${REPOSITORY:?}" "${URL:?}"

[[ $COMMIT =~ ^[0-9a-f]{40}$ ]] || { echo "status: $COMMIT is no commit" >&2 && exit 2; }
case $RESULT in
success) state=success ;;
failure) state=failure ;;
*) state=error ;; # cancelled or skipped: nothing was shown
esac
gh api --silent --method POST "repos/$REPOSITORY/statuses/$COMMIT" --field "state=$state" --field context=hardware \
    --field "description=on boards: $RESULT" --field "target_url=$URL"
