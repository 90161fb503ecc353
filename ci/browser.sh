#!/usr/bin/env bash
# ci/browser.sh: the pages of runs and of `recipe serve` in a real browser. Adds playwright to .venv, by hash; the
# browser is the machine's own (chromium or google-chrome), none is downloaded.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --only-binary :all: \
    -r requirements/browser.txt
exec .venv/bin/python -m pytest -q -n 0 tests/browser
