#!/usr/bin/env bash
# mypy, one recipe folder at a time: the folders are no packages, and each has a train.py of its own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD

for folder in recipes/*/; do
    if compgen -G "$folder*.py" >/dev/null; then
        (cd "$folder" && MYPYPATH="$root" "$root/.venv/bin/python" -m mypy --config-file "$root/pyproject.toml" \
            --cache-dir "$root/.mypy_cache" ./*.py)
    fi
done
