#!/usr/bin/env bash
# mypy, one recipe at a time: each under the name of the package that common/recipe.py makes of it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
linked=$(mktemp -d)
trap 'rm -r "$linked"' EXIT

for folder in recipes/*/; do
    ln -sfn "$PWD/$folder" "$linked/this_recipe"
    MYPYPATH=$PWD:$linked .venv/bin/python -m mypy --config-file pyproject.toml -p this_recipe
done
