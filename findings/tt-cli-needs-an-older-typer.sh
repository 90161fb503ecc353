#!/usr/bin/env bash
# Tenstorrent's command line, the package `tenstorrent` 1.2.1, does not start with the newest typer that it allows.
#
#   versions    tenstorrent 1.2.1, typer 0.29.2 and 0.28.0; Python 3.11
#   behavior    its metadata takes any typer, so `pip install tenstorrent==1.2.1` brings 0.29.2. `tt --version` then ends
#               in a traceback at import: AttributeError, module 'typer._click' has no attribute 'types'. With typer
#               0.28.0 it prints its version. Whoever sets up a board's host with it needs `typer<0.29` beside it.
#   output      AttributeError: module 'typer._click' has no attribute 'types'
#               tt 1.2.1 (the second time)
#
# Ends with 0 while that is so, with 1 where it has changed.
set -euo pipefail

python=${PYTHON:-python3.11}
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
"$python" -m venv "$place/venv"

with_typer() { # VERSION: what `tt --version` prints with it
    "$place/venv/bin/pip" install --quiet --disable-pip-version-check tenstorrent==1.2.1 "typer==$1" >&2
    HOME=$place "$place/venv/bin/tt" --version 2>&1 | tail -n 1 || true
}

newest=$(with_typer 0.29.2)
older=$(with_typer 0.28.0)
printf 'typer 0.29.2: %s\ntyper 0.28.0: %s\n' "$newest" "$older"
[[ $newest == *"has no attribute 'types'"* && $older == *1.2.1* ]] || {
    echo 'this has changed'
    exit 1
}
