"""A real `recipe serve` in a process of its own, and ways to talk to it: OpenAI's client, plain HTTP, a raw socket."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from common.paths import ROOT

PATIENCE = 120.0  # seconds that anything may take before a test gives up: the machine may be busy with other things


class Server:
    """`recipe serve` with `words`, ready when the block begins. SIGTERM must end it then, with code `ends`."""

    def __init__(self, *words: object, cwd: Path | None = None, ready: bool = True, ends: int = 0) -> None:
        self.words, self.cwd, self.awaited, self.ends = [str(word) for word in words], cwd, ready, ends
        self.lines: list[str] = []
        self.url = ""

    def __enter__(self) -> Server:
        command = [sys.executable, "-m", "tools.cli", "serve", *self.words, "--port", "0"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        core = max(os.sched_getaffinity(0))  # one: threads that wait for each other are slow on a busy machine
        self.process = subprocess.Popen(
            ["taskset", "-c", str(core), *command], cwd=self.cwd, env=environment, stderr=subprocess.PIPE, text=True
        )
        self.said: queue.Queue[str] = queue.Queue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        self.url = re.findall(r"listening at (\S+);", self.wait_for("listening at "))[0]
        if self.awaited:
            self.wait_for("try: curl ")
        return self

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))
            self.said.put(line)
        self.said.put("")

    def wait_for(self, text: str) -> str:
        """Return the next line with `text`, that comes from now on or has not been waited past."""
        while line := self.said.get(timeout=PATIENCE):
            if text in line:
                return line
        raise AssertionError(f"ended without {text!r}:\n" + "\n".join(self.lines))

    def __exit__(self, *failed: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self.ended()
        if failed[0] is None:
            assert code == self.ends, "\n".join(self.lines)

    def ended(self) -> int:
        """Wait for the end of the process and return its code."""
        code = self.process.wait(PATIENCE)
        self.reader.join(PATIENCE)
        return code

    def client(self, **options: Any) -> Any:
        """Return OpenAI's client. It tries nothing again unless asked to."""
        import openai

        settings = {"api_key": "none", "max_retries": 0, "timeout": PATIENCE, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **settings)

    def ask(self, path: str, body: Any = None, method: str | None = None, **headers: str) -> tuple[int, Any, Any]:
        """Return status, body (read as JSON) and headers of a plain request; bytes of a `body` are sent as they are."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json", **{name.replace("_", "-"): v for name, v in headers.items()}}
        request = urllib.request.Request(self.url + path, data=data, headers=headers, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=PATIENCE) as response:
                return response.status, json.loads(response.read()), response.headers
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read()), error.headers

    def socket(self) -> socket.socket:
        """Return a connection, to write whatever to it."""
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return socket.create_connection((host, int(port)), timeout=PATIENCE)

    def until(self, **counts: int) -> None:
        """Wait until /health has these counts. Raises AssertionError where it never does."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            health = self.ask("/health")[1]
            if all(health[name] == count for name, count in counts.items()):
                return
            time.sleep(0.02)
        raise AssertionError(f"{health}, awaited {counts}")

    def resident(self) -> int:
        """Return the bytes of memory that the process holds now."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")
