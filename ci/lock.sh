#!/usr/bin/env bash
# make lock: uv, pinned by hash, in an environment of its own; then ci/lock.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tools=.venv-tools
python=${PYTHON:-python3}
[ -x $tools/bin/python ] || "$python" -m venv $tools
if [ -f requirements/tools.txt ]; then
    $tools/bin/python -m pip install --quiet --no-deps --require-hashes --only-binary :all: -r requirements/tools.txt
else
    # The very first lock: there is no pin to hold uv to yet.
    $tools/bin/python -m pip install --quiet -r requirements/tools.in
fi
exec $tools/bin/python ci/lock.py
