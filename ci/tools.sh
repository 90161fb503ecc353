#!/usr/bin/env bash
# ci/tools.sh COMMAND...: runs a tool of requirements/tools.txt, pinned by hash, in an environment of its own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tools=.venv-tools
stamp=$tools/tools.stamp
python=${PYTHON:-python3}
if ! cmp -s requirements/tools.txt $stamp || ! $tools/bin/python -m pip --version >/dev/null 2>&1; then
    "$python" -m venv $tools
    $tools/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes \
        --only-binary :all: -r requirements/tools.txt
    cp requirements/tools.txt $stamp
fi
PATH=$PWD/$tools/bin:$PATH exec "$@"
