#!/usr/bin/env bash
# ci/lock-pull-request.sh: a pull request that renews docker/images.lock.json, with the goldens recorded again in it.
#
#   TARGET= REPOSITORY= DIGEST=   record what was published; without them, read every pin again: recipe lock --upgrade
#   ACTOR=user                    pull that to look at its pins by a login with GH_TOKEN: a private package
#   DRY=1                         commits here, and prints the pull request instead of opening it
#   GH_TOKEN=                     may write contents and pull requests; gh and git are the machine's own
#
# Lock and goldens change together, so that what a new image does to the figures is read in one place. Nothing to renew
# is no error and no pull request; nor is what an open one renews already.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

[ -z "$(git status --porcelain --untracked-files=no)" ] || { echo "lock: the tree has changes of its own" >&2 && exit 2; }

if [ -n "${DIGEST:-}" ]; then
    what="The image of ${TARGET:?} is published"
    if [ -n "${ACTOR:-}" ]; then # the login lies in a folder of its own, which goes with this script
        DOCKER_CONFIG=$(mktemp -d)
        export DOCKER_CONFIG
        trap 'rm -rf "$DOCKER_CONFIG"' EXIT
        docker login "${REPOSITORY%%/*}" --username "$ACTOR" --password-stdin <<<"${GH_TOKEN:?}" >&2
    fi
    .venv/bin/recipe image publish "$TARGET" --to "${REPOSITORY:?}" --pushed "$DIGEST" --replace
else
    what="The pins of the images, read again"
    .venv/bin/recipe lock --upgrade
fi
if git diff --quiet -- docker/images.lock.json; then
    echo "lock: nothing changes"
    exit 0
fi

branch=image-lock/$(sha256sum docker/images.lock.json | cut -c 1-12) # the same content twice is the same branch
if [ -z "${DRY:-}" ]; then # before the goldens take their minutes
    gh auth setup-git
    code=0
    git ls-remote --exit-code origin "refs/heads/$branch" >/dev/null || code=$?
    case $code in
    0)
        echo "lock: $branch is there already: merge its pull request; to have it made anew, delete the branch"
        exit 0
        ;;
    2) ;; # none
    *) exit $code ;;
    esac
fi
body=$(mktemp)
commit() { # MESSAGE FILE...
    local message=$1
    shift
    git add -- "$@"
    git -c user.name='github-actions[bot]' -c user.email='41898282+github-actions[bot]@users.noreply.github.com' \
        commit --quiet --message "$message"
}

git switch --quiet --create "$branch"
commit "$what" docker/images.lock.json
.venv/bin/python -m ci.golden --record # needs a clean tree: the lock's commit comes first
git diff --quiet || commit "The goldens, recorded with that lock" recipes README.md docs/board.md

cat >"$body" <<'END'
Made by `ci/lock-pull-request.sh`. Read both commits: what the lock pins now, and what that does to the figures.
Checks start once somebody closes and reopens this pull request: GitHub starts none for what a workflow's token opens.

Figures that no hosted runner can record again (none, where the list is empty):
END
.venv/bin/python -m ci.golden --check >>"$body" || [ $? = 6 ]
{
    echo '```diff'
    git diff HEAD~1 -- recipes/*/results.yaml
    echo '```'
} >>"$body"

if [ -n "${DRY:-}" ]; then
    echo "lock: $branch is committed here and goes nowhere"
    cat "$body"
    exit 0
fi
git push --quiet origin "$branch"
gh pr create --head "$branch" --title "$what" --body-file "$body"
