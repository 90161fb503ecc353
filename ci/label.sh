#!/usr/bin/env bash
# ci/label.sh: a maintainer's label on a pull request becomes a run of hardware.yml on the commit that was labelled.
#
#   LABEL=hardware:n150   `hardware` for every board in service, `hardware:BOARD` for one
#   PULL= SHA= SENDER=    the pull request, its commit when the label was put on, and who put it on
#   REPOSITORY=owner/name GH_TOKEN=    the token may read collaborators, take labels off and start workflows
#
# Triage may label but not write: only who may write code here may have code run on a board. The label is taken off, so
# that it says nothing about later commits: those are run when it is put on again.
set -euo pipefail
: "${LABEL:?}" "${PULL:?}" "${SHA:?}" "${SENDER:?}" "${REPOSITORY:?}"

die() { # the code of a usage error
    echo "label: $*" >&2
    exit 2
}

[[ $LABEL =~ ^hardware(:([a-z0-9]+))?$ ]] || die "$LABEL is no label for hardware: hardware, or hardware:BOARD"
board=${BASH_REMATCH[2]:-}
[[ $PULL =~ ^[0-9]+$ ]] || die "$PULL is no number of a pull request"
[[ $SHA =~ ^[0-9a-f]{40}$ ]] || die "$SHA is no commit"
[[ $SENDER =~ ^[A-Za-z0-9_-]+$ ]] || die "$SENDER is no name of a user"

permission=$(gh api "repos/$REPOSITORY/collaborators/$SENDER/permission" --jq .permission)
gh api --silent --method DELETE "repos/$REPOSITORY/issues/$PULL/labels/$LABEL"
case $permission in
admin | write) ;;
*) die "$SENDER has the permission '$permission' here; to run code on a board takes 'write'" ;;
esac
gh workflow run hardware.yml --repo "$REPOSITORY" --ref main --field "commit=$SHA" --field "board=$board"
echo "label: $SHA of #$PULL goes to ${board:-every board in service}, on the word of $SENDER"
