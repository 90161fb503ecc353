#!/usr/bin/env bash
# ci/without-recipe.sh [NAME...]: shows that nothing else needs a recipe. In a clone of HEAD these folders of recipes/ are
# deleted, together; then `make docs lint test test-runs` must be green. Without a name each recipe in turn; minutes for each.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD

without() ( # NAME...
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    echo "== without $*, in a clone of $(git rev-parse --short HEAD)"
    git clone -q "$root" "$folder"
    ln -s "$root/.venv" "$folder/.venv"
    cd "$folder"
    git rm -rq "${@/#/recipes/}"
    make --assume-old=setup docs lint test test-runs # the set-up is this checkout's
)

if [ $# -gt 0 ]; then
    without "$@"
else
    for config in recipes/*/config.yaml; do without "$(basename "$(dirname "$config")")"; done
fi
