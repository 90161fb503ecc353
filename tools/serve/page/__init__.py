"""The page at `/`, to talk to the models in a browser: one HTML file, put together once from three that can be read.

Its Content-Security-Policy lets exactly our script and our style run, by their hashes, lets the page ask this server
and nobody else, and (`require-trusted-types-for`) lets no text become HTML: answers and prompts are anybody's text.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from pathlib import Path

from markupsafe import Markup
from starlette.responses import HTMLResponse, Response

from tools.templates import render

ROOM = Path(__file__).parent


def response(*, loading: bool, needs_key: bool) -> Response:
    """Return the page; while the server is `loading`, one that looks again every second."""
    text, policy = page(loading, needs_key)
    headers = {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-store",  # another server may listen at this address tomorrow
    }
    return HTMLResponse(text, headers=headers)


@functools.cache
def page(loading: bool, needs_key: bool) -> tuple[str, str]:
    """Return the page's HTML, and the Content-Security-Policy that it is to be sent with."""
    style, script = ((ROOM / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    policy = {
        "default-src": "'none'",
        "script-src": digest(script),
        "style-src": digest(style),
        "connect-src": "'self'",
        "img-src": "data:",  # the icon
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    text = render(
        ROOM / "page.html",
        html=True,
        style=Markup(style),
        script=Markup(script),
        loading=loading,
        needs_key=needs_key,
    )
    return text, "; ".join(f"{name} {value}" for name, value in policy.items())


def digest(text: str) -> str:
    """Return the source expression that allows an inline script or style of exactly this text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
