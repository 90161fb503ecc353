"""Two web servers over one folder: http, which sends all but the live archive on to https, and https."""

from __future__ import annotations

import os
import shutil
import ssl
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote, urlsplit


class Sites:
    """The servers, while they are entered; `http` and `https` are their addresses without a slash at the end.

    Set while they serve:
    unavailable: so many requests for the snapshot are answered with 503, as Ubuntu's at times are.
    redirects: False for a plain mirror, whose http answers itself.
    """

    unavailable = 0
    redirects = True

    def __init__(self, folder: Path, address: str, context: ssl.SSLContext) -> None:
        self._servers = [Server(folder, address, self), Server(folder, address, self)]
        plain, secure = self._servers
        secure.socket = context.wrap_socket(secure.socket, server_side=True)
        self.http = f"http://{address}:{plain.server_port}"
        self.https = plain.sends_to = f"https://{address}:{secure.server_port}"

    def __enter__(self) -> Sites:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()  # asked so often to end
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()


class Server(ThreadingHTTPServer):
    """One server; `sends_to` is the address of the other, where it is the plain one."""

    daemon_threads = True
    sends_to: str | None = None

    def __init__(self, folder: Path, address: str, sites: Sites) -> None:
        super().__init__((address, 0), Handler)
        self.folder = folder
        self.sites = sites

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of a client that goes away: one that knows no such authority does."""


class Handler(BaseHTTPRequestHandler):
    """Files of the folder; git repositories by git's own backend."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if self.server.sends_to and self.server.sites.redirects and not path.startswith("/live/"):
            self.send_response(301)
            self.send_header("Location", self.server.sends_to + self.path)
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif path.startswith("/snapshot/") and self.server.sites.unavailable:
            self.server.sites.unavailable -= 1
            self.send_error(503)
        elif ".git/" in path:
            self.git(path)
        else:
            self.file(self.server.folder / path.lstrip("/"))

    def do_POST(self) -> None:
        self.git(unquote(urlsplit(self.path).path))

    def file(self, path: Path) -> None:
        served = [self.server.folder / name for name in ("live", "snapshot", "github")]
        if not path.is_file() or not any(path.resolve().is_relative_to(folder.resolve()) for folder in served):
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(path.stat().st_size))
        self.end_headers()
        with path.open("rb") as content:
            shutil.copyfileobj(content, self.wfile)

    def git(self, path: str) -> None:
        """Answer by `git http-backend`, a CGI program."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        environment = os.environ | {
            "GIT_PROJECT_ROOT": str(self.server.folder),
            "GIT_HTTP_EXPORT_ALL": "1",
            "GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
            "PATH_INFO": path,
            "QUERY_STRING": urlsplit(self.path).query,
            "REQUEST_METHOD": self.command,
            "CONTENT_TYPE": self.headers.get("Content-Type", ""),
            "CONTENT_LENGTH": str(len(body)),
            "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
            "REMOTE_ADDR": "127.0.0.1",
        }
        done = subprocess.run(["git", "http-backend"], input=body, env=environment, capture_output=True, check=False)
        head, _, content = done.stdout.partition(b"\r\n\r\n")
        fields = dict(line.split(": ", 1) for line in head.decode().split("\r\n"))
        self.send_response(int(fields.pop("Status", "200").split()[0]))
        for name, value in fields.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *words: object) -> None:
        """Log nothing."""
