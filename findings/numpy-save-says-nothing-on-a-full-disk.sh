#!/usr/bin/env bash
# numpy.save ends well where the disk has no room for the end of a small array, and leaves a file that is too short.
#
#   versions    numpy 2.4.6 and 1.26.4; Python 3.11, Linux
#   behavior    The header is written by Python, the array by C's stdio. What still lies in stdio's buffer, 4 KiB, is
#               written when its file is closed, and what that close answers is not looked at: an array whose last
#               bytes find no room (or an I/O error, or the end of a quota) is saved without a word. A larger array
#               fails as one expects. Whoever depends on the file writes the header and then the array's own bytes.
#   output      numpy 2.4.6: saved, 200 of 288 bytes; loading it: ValueError
#               numpy 1.26.4: saved, 200 of 288 bytes; loading it: ValueError
#
# A limit on the size of files stands for the full disk. Ends with 0 while that is so, with 1 where it has changed.
set -euo pipefail

python=${PYTHON:-python3.11}
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT

cat >"$place/save.py" <<'PY'
import os, resource, signal, sys
import numpy as np

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write is then refused, as on a full disk
np.save(sys.argv[1], np.arange(20))
whole = os.path.getsize(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
np.save(sys.argv[1], np.arange(20))
size = os.path.getsize(sys.argv[1])
try:
    np.load(sys.argv[1])
    read = "nothing wrong"
except ValueError:
    read = "ValueError"
print(f"numpy {np.__version__}: saved, {size} of {whole} bytes; loading it: {read}")
PY

for version in 2.4.6 1.26.4; do
    "$python" -m venv "$place/$version"
    "$place/$version/bin/pip" install --quiet --disable-pip-version-check "numpy==$version" >&2
    found=$("$place/$version/bin/python" "$place/save.py" "$place/a.npy")
    echo "$found"
    [ "$found" = "numpy $version: saved, 200 of 288 bytes; loading it: ValueError" ] || exit 1
done
