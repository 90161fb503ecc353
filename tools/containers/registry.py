"""What a registry has under an image's name, asked of its HTTP API: neither an engine nor buildx is needed for it.

The API is that of the OCI distribution specification (v2), which Docker Hub and ghcr.io speak. A digest is computed of
what was sent, never taken from a header; nothing is sent to a registry but the image's name.
"""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import json
import re
import ssl
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException, HTTPMessage
from pathlib import Path
from typing import Any

from common.errors import MachineError, UsageError

SECONDS = 30  # without an answer
LARGEST = 4 << 20  # bytes of a manifest or an image's config: what the specification has registries take at least
INDEXES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
MANIFESTS = ("application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json")
PLATFORM = {"os": "linux", "architecture": "amd64"}
TIME = "%Y-%m-%dT%H:%M:%SZ"  # of an image's build
# What a request ends with where no answer comes, or one that is none: http.client has errors that are no OSError.
NETWORK = (OSError, ValueError, HTTPException)


@dataclass(frozen=True)
class Found:
    """What a tag names now: the digest that `image@digest` takes, and when that image was built, where it says so."""

    digest: str
    created: str | None  # 2026-10-01T00:00:00Z


@dataclass(frozen=True)
class Place:
    """An image's name, taken apart: the host that is asked, the repository there, and the tag."""

    host: str
    repository: str
    tag: str

    @property
    def url(self) -> str:
        """The address below which its manifests and blobs are: https, and plain http for this machine alone."""
        return f"{'http' if _is_loopback(self.host) else 'https'}://{self.host}/v2/{self.repository}"


def place_of(image: str) -> Place:
    """Return where an image is, by Docker's rules: without a host it is Docker Hub's, without an owner an official one.

    Raises MachineError for what is no name with a tag.
    """
    name = r"(?P<name>[a-z0-9]+(?:(?:[._-]+|/)[a-z0-9]+)*)"
    parts = re.fullmatch(rf"(?:(?P<host>[\w-]+(?:[.:][\w-]+)+|localhost)/)?{name}:(?P<tag>[\w.-]+)", image)
    if parts is None:
        raise MachineError(f"not an image's name with a tag: {image!r}", todo="name it as repository:tag")
    if parts["host"]:
        return Place(parts["host"], parts["name"], parts["tag"])
    repository = parts["name"] if "/" in parts["name"] else f"library/{parts['name']}"
    return Place("registry-1.docker.io", repository, parts["tag"])


def authorities(ca: Path | None) -> ssl.SSLContext:
    """Return whose certificates are believed: of those in the PEM file `ca`, or of this machine's.

    Raises UsageError where that file cannot be read or has no certificate.
    """
    try:
        return ssl.create_default_context(cafile=str(ca) if ca else None)
    except OSError as error:  # SSLError is one
        raise UsageError(
            f"no certificate can be read there: {error.strerror or error}",
            where=str(ca),
            todo="name a PEM file, with a line -----BEGIN CERTIFICATE-----: CA_BUNDLE=ca.pem",
        ) from error


def find(image: str, trust: ssl.SSLContext | None = None) -> Found:
    """Return what the registry of `image` has for its tag now; `trust` is of `authorities`, default this machine's.

    Raises MachineError where it does not answer, or answers something that is not to be trusted.
    """
    place = place_of(image)
    asked = _Asked(place, trust or authorities(None))
    digest, manifest = asked.manifest(place.tag)
    try:
        return Found(digest, asked.created(manifest))
    except (MachineError, LookupError, TypeError, AttributeError):  # a detail, in a form that no rule fixes
        return Found(digest, None)


class _StayHere(urllib.request.HTTPRedirectHandler):
    """Follow no redirect unseen: urllib would take the token along, to any host."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class _Asked:
    """One registry, asked anonymously about one repository."""

    def __init__(self, place: Place, trust: ssl.SSLContext) -> None:
        self.place = place
        self._open = urllib.request.build_opener(_StayHere(), urllib.request.HTTPSHandler(context=trust)).open
        self._token: str | None = None

    def manifest(self, reference: str) -> tuple[str, Any]:
        """Return a manifest's or an index's digest, and it. Raises MachineError where they are not of one another."""
        body, headers = self._get(f"{self.place.url}/manifests/{reference}")
        digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
        told = headers.get("Docker-Content-Digest", digest)
        if told != digest or (reference.startswith("sha256:") and reference != digest):
            raise self._wrong(f"it tells the digest {told} and sends what has {digest}")
        return digest, self._json(body)

    def created(self, manifest: Any) -> str | None:
        """Return when the image of this machine's platform was built, as its config has it.

        None where that is no time, or one that is yet to come: a build can write there what it likes.
        """
        if manifest.get("mediaType") in INDEXES:
            found = [one for one in manifest["manifests"] if PLATFORM.items() <= one.get("platform", {}).items()]
            if not found:
                return None
            manifest = self.manifest(found[0]["digest"])[1]
        digest = manifest["config"]["digest"]
        body, _ = self._get(f"{self.place.url}/blobs/{digest}", elsewhere=True)
        if f"sha256:{hashlib.sha256(body).hexdigest()}" != digest:
            raise self._wrong(f"it sends other content than that of {digest}")
        created = str(self._json(body).get("created"))[:19] + "Z"
        try:
            built = datetime.datetime.strptime(created, TIME)
        except ValueError:
            return None
        now = datetime.datetime.now(datetime.timezone.utc)
        return created if built.date() <= now.date() else None

    def _get(self, url: str, *, elsewhere: bool = False) -> tuple[bytes, HTTPMessage]:
        """Return the content at an address, and its headers. `elsewhere`: follow one redirect, without the token."""
        request = urllib.request.Request(url, headers={"Accept": ", ".join((*INDEXES, *MANIFESTS))})
        if self._token:
            request.add_unredirected_header("Authorization", f"Bearer {self._token}")
        try:
            return self._answer(request)
        except urllib.error.HTTPError as error:
            with error:
                if error.code == 401 and self._token is None:
                    self._token = self._ask_for_token(error.headers.get("WWW-Authenticate", ""))
                    return self._get(url, elsewhere=elsewhere)
                target = error.headers.get("Location", "")
                if not (elsewhere and 300 <= error.code < 400 and target.startswith("https://")):
                    sends = f", to {target}" if target else ""
                    raise self._wrong(f"it answers {error.code} {error.reason}{sends}") from error
        try:
            return self._answer(target)
        except urllib.error.HTTPError as error:
            raise self._wrong(f"it sends to {target}, which answers {error.code} {error.reason}") from error

    def _answer(self, request: urllib.request.Request | str) -> tuple[bytes, HTTPMessage]:
        """Return what one request is answered with. Raises HTTPError for an answer of another code than 200's."""
        try:
            with self._open(request, timeout=SECONDS) as answer:
                return self._content(answer), answer.headers
        except urllib.error.HTTPError:
            raise
        except NETWORK as error:
            url = request if isinstance(request, str) else request.full_url
            host = urllib.parse.urlsplit(url).netloc
            raise MachineError(f"{host} does not answer: {getattr(error, 'reason', error)}") from error

    def _ask_for_token(self, challenge: str) -> str:
        """Return the token that a registry gives to anybody. Raises MachineError where it does not say where it is."""
        fields = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
        realm = fields.pop("realm", "")
        host = urllib.parse.urlsplit(realm).hostname or ""
        if not challenge.lower().startswith("bearer ") or not (realm.startswith("https://") or _is_loopback(host)):
            raise self._wrong("it wants a login, and names no place that gives a token to anybody")
        query = urllib.parse.urlencode({key: fields[key] for key in ("service", "scope") if key in fields})
        try:
            given = self._json(self._answer(f"{realm}?{query}")[0])
        except urllib.error.HTTPError as error:
            raise self._wrong(f"the place of its tokens, {realm}, answers {error.code} {error.reason}") from error
        token = given.get("token") or given.get("access_token")
        if not isinstance(token, str):
            raise self._wrong(f"the place of its tokens gives none: {realm}")
        return token

    def _content(self, answer: Any) -> bytes:
        content: bytes = answer.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise self._wrong(f"it sends more than {LARGEST} bytes")
        return content

    def _json(self, body: bytes) -> Any:
        try:
            value = json.loads(body)
        except ValueError as error:
            raise self._wrong("what it sends is no JSON") from error
        if not isinstance(value, dict):
            raise self._wrong("what it sends is no JSON object")
        return value

    def _wrong(self, what: str) -> MachineError:
        return MachineError(f"{self.place.host}, asked for {self.place.repository}:{self.place.tag}: {what}")


def _is_loopback(host: str) -> bool:
    name = urllib.parse.urlsplit(f"//{host}").hostname or ""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"
