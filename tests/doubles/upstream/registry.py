"""A registry of images: the part of its HTTP API (v2) that `docker push`, `docker pull` and `recipe lock` use."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import ssl
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType, TracebackType
from urllib.parse import parse_qs, urlsplit

from common.files import sha256_file

PATH = re.compile(r"/v2/(?P<name>.+)/(?P<kind>manifests|blobs|blobs/uploads)/(?P<reference>[^/]*)$")


class Registry:
    """A registry while it is entered, on loopback: plain http, which Docker allows there, or https with a `context`.

    It keeps blobs and manifests below `folder`. Set while it serves:
    token: whether a pull needs an anonymous token, as Docker Hub's does.
    fault: what it answers wrongly. "no-token": 401 without saying where tokens are. "digest": a manifest's header names
    another digest than its content has. "redirect": manifests are said to lie elsewhere. "content-elsewhere": blobs are
    said to lie where nobody listens. "no-http": what it answers is no HTTP.
    """

    def __init__(self, folder: Path, context: ssl.SSLContext | None = None) -> None:
        for name in ("blobs", "manifests", "uploads"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.registry = self
        if context:
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.folder = folder
        self.host = f"127.0.0.1:{self._server.server_port}"  # as an image's name begins: HOST/name:tag
        self.url = f"{'https' if context else 'http'}://{self.host}"
        self.token = False
        self.fault = ""

    def __enter__(self) -> Registry:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()  # asked so often to end
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def blob(self, digest: str) -> Path:
        """Return where the content of that digest lies."""
        return self.folder / "blobs" / digest.removeprefix("sha256:")

    def manifest(self, name: str, reference: str) -> Path:
        """Return the file that holds the digest of what a tag names, or the media type of what a digest names."""
        return self.folder / "manifests" / f"{name}:{reference}".replace("/", "%").replace(":", "%")

    def put(self, content: bytes) -> str:
        """Keep content; return its digest."""
        digest = "sha256:" + hashlib.sha256(content).hexdigest()
        self.blob(digest).write_bytes(content)
        return digest

    def put_manifest(self, name: str, reference: str, kind: str, content: bytes) -> str:
        """Keep a manifest or an index under a tag or its digest; return its digest."""
        digest = self.put(content)
        self.manifest(name, digest).write_text(kind)
        if reference != digest:
            self.manifest(name, reference).write_text(digest)
        return digest


class Server(ThreadingHTTPServer):
    """The web server of a registry."""

    daemon_threads = True
    registry: Registry

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of a client that goes away."""


class Handler(BaseHTTPRequestHandler):
    """One request to the registry."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        registry = self.server.registry
        address = urlsplit(self.path)
        if registry.fault == "no-http":
            self.wfile.write(b"no HTTP\r\n")
            self.close_connection = True
        elif address.path == "/token":
            self.answer(200, json.dumps({"token": "anonymous"}).encode())
        elif registry.token and self.headers.get("Authorization") != "Bearer anonymous":
            found = PATH.match(address.path)
            scope = f'scope="repository:{found["name"]}:pull"' if found else ""
            where = f'Bearer realm="{registry.url}/token",service="stand-in",{scope}'
            self.answer(401, fields={} if registry.fault == "no-token" else {"WWW-Authenticate": where})
        elif address.path == "/v2/":
            self.answer(200, b"{}")
        elif not (found := PATH.match(address.path)):
            self.answer(404)
        elif found["kind"] == "manifests":
            self.manifest(found["name"], found["reference"])
        elif registry.fault == "content-elsewhere":
            self.answer(307, fields={"Location": "https://127.0.0.1:1/blob"})  # port 1: nobody listens
        elif registry.blob(found["reference"]).exists():
            content = registry.blob(found["reference"]).read_bytes()
            self.answer(200, content, fields={"Docker-Content-Digest": found["reference"]})
        else:
            self.answer(404)

    do_HEAD = do_GET

    def manifest(self, name: str, reference: str) -> None:
        registry = self.server.registry
        path = registry.manifest(name, reference)
        if registry.fault == "redirect":
            self.answer(307, fields={"Location": "https://elsewhere.example.org/manifest"})
        elif not path.exists():
            self.answer(404)
        else:
            digest = reference if reference.startswith("sha256:") else path.read_text()
            kind = registry.manifest(name, digest).read_text()
            told = "sha256:" + "0" * 64 if registry.fault == "digest" else digest
            self.answer(200, registry.blob(digest).read_bytes(), kind, {"Docker-Content-Digest": told})

    def do_POST(self) -> None:
        found = PATH.match(self.path.split("?")[0])
        upload = secrets.token_hex(8)  # several go on at once, by connections that are shared
        (self.server.registry.folder / "uploads" / upload).write_bytes(b"")
        self.answer(
            202, fields={"Location": f"/v2/{found['name'] if found else ''}/blobs/uploads/{upload}", "Range": "0-0"}
        )

    def do_PATCH(self) -> None:
        address = urlsplit(self.path)
        size = self.receive(self.server.registry.folder / "uploads" / Path(address.path).name)
        self.answer(202, fields={"Location": address.path, "Range": f"0-{max(0, size - 1)}"})

    def do_PUT(self) -> None:
        registry = self.server.registry
        address = urlsplit(self.path)
        found = PATH.match(address.path)
        if found and found["kind"] == "manifests":
            kind = self.headers.get("Content-Type", "")
            digest = registry.put_manifest(found["name"], found["reference"], kind, b"".join(self.pieces()))
        else:
            upload = registry.folder / "uploads" / Path(address.path).name
            self.receive(upload)
            digest = "sha256:" + sha256_file(upload)
            if digest != parse_qs(address.query)["digest"][0]:
                self.answer(400)
                return
            upload.rename(registry.blob(digest))
        self.answer(201, fields={"Docker-Content-Digest": digest, "Location": address.path})

    def receive(self, path: Path) -> int:
        """Append the request's content to a file; return the file's size."""
        with path.open("ab") as file:
            for piece in self.pieces():
                file.write(piece)
            return file.tell()

    def pieces(self) -> Iterator[bytes]:
        """Yield the request's content: all of it, or chunk by chunk."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            yield self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def answer(
        self,
        code: int,
        content: bytes = b"",
        kind: str = "application/json",
        fields: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.send_response(code)
        for name, value in fields.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *words: object) -> None:
        """Log nothing."""
