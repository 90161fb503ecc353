#!/usr/bin/env bash
# ci/hardware.sh PHASE: one phase of the hardware job, on the host of a board. What runs when: ci/hardware/README.md.
# `exec`, so that a signal to this script is the phase's own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec .venv/bin/python -m ci.hardware "$@"
