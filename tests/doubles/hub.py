"""A Hugging Face Hub on this machine: repositories with commits, branches, Git LFS, gates and tokens.

As much as huggingface_hub asks of the real one for a model: its facts at a revision (`/api/models/...`), its tree, and
its files, whole or by ranges. Refusals carry the Hub's own X-Error-Code and X-Error-Message, as the library reads them
(huggingface_hub, utils/_http.py, hf_raise_for_status).
"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LFS = (".safetensors", ".bin", ".gguf")  # kept by Git LFS, which knows their sha256
BAD_TOKEN = "Invalid credentials in Authorization header"


def files_of(folder: Path) -> dict[str, bytes]:
    """The files of a folder by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@dataclass
class Repository:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    card: Mapping[str, Any] = field(default_factory=dict)
    gated: bool = False


@dataclass
class Hub:
    """The Hub as a test sees it: its repositories, who may read gated ones (token -> names), what it was asked."""

    address: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    readers: dict[str, set[str]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    on_request: Callable[[str], None] = lambda _path: None

    def push(
        self,
        repo: str,
        files: Mapping[str, bytes],
        *,
        commit: str | None = None,
        branch: str = "main",
        card: Mapping[str, Any] | None = None,
        gated: bool = False,
    ) -> str:
        """Make `files` the newest commit of a branch; return its id."""
        text = json.dumps([repo, {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}])
        commit = commit or hashlib.sha1(text.encode()).hexdigest()
        there = self.repositories.setdefault(repo, Repository())
        there.commits[commit] = dict(files)
        there.branches[branch] = commit
        there.card, there.gated = card or there.card, gated
        return commit


class Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def answer(self, body: bool) -> None:
        self.body = body
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(self.path)
        self.hub.on_request(path)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.readers:
            return self.refuse(401, message=BAD_TOKEN)
        facts = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path)
        content = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+|refs/pr/\d+)/(.+)", path)
        repo = (facts or content or ["", ""])[1]
        there = self.hub.repositories.get(repo)
        if there is None:
            return self.refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        name = (facts[3] if facts else content[2] if content else None) or "main"
        commit = name if name in there.commits else there.branches.get(name, "")
        if not commit:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {name}")
        if facts:
            tree = facts[2] == "tree"
            return self.send_json(self.tree(there, commit) if tree else self.facts(repo, there, commit))
        if there.gated and repo not in self.hub.readers.get(token, set()):
            what = f"Access to model {repo} is restricted."
            return self.refuse(403 if token else 401, "GatedRepo", what)
        assert content is not None
        if content[3] not in there.commits[commit]:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        return self.send_file(content[3], there.commits[commit][content[3]], commit)

    def facts(self, repo: str, there: Repository, commit: str) -> dict[str, Any]:
        siblings = []
        for name, content in there.commits[commit].items():
            entry: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": blob_id(content)}
            if name.endswith(LFS):
                sha256 = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 134}
            siblings.append(entry)
        gated = "manual" if there.gated else False
        return {"id": repo, "sha": commit, "gated": gated, "cardData": there.card, "siblings": siblings}

    def tree(self, there: Repository, commit: str) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": name, "size": len(content), "oid": blob_id(content)}
            for name, content in there.commits[commit].items()
        ]

    def send_json(self, value: Any) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send_file(self, name: str, content: bytes, commit: str) -> None:
        etag = hashlib.sha256(content).hexdigest() if name.endswith(LFS) else blob_id(content)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        part = content[int(wanted[1]) : int(wanted[2]) + 1 if wanted[2] else None] if wanted else content
        if wanted:
            headers["Content-Range"] = f"bytes {wanted[1]}-{int(wanted[1]) + len(part) - 1}/{len(content)}"
        self.send(206 if wanted else 200, part, headers)

    def refuse(self, status: int, code: str = "", message: str = "") -> None:
        headers = {"X-Error-Code": code} if code else {}
        self.send(status, json.dumps({"error": message}).encode(), {**headers, "X-Error-Message": message})

    def send(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.body:
            self.wfile.write(content)

    def do_GET(self) -> None:
        self.answer(True)

    def do_HEAD(self) -> None:
        self.answer(False)

    def log_message(self, *_arguments: Any) -> None:
        pass


def blob_id(content: bytes) -> str:
    """Git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextlib.contextmanager
def serve_hub() -> Iterator[Hub]:
    """Serve an empty Hub on a free port of this machine, in a thread, until the block ends."""
    hub = Hub()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("OneHub", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
