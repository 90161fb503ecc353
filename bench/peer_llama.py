"""llama.cpp's server as the package xllamacpp has it, with its own defaults: bench/serving.py starts it."""

from __future__ import annotations

import signal
import sys

import xllamacpp

if __name__ == "__main__":
    params = xllamacpp.CommonParams()
    params.model.path, port, streams = sys.argv[1:]
    params.hostnames, params.port, params.n_parallel = ["127.0.0.1"], int(port), int(streams)
    server = xllamacpp.Server(params)
    signal.pause()
