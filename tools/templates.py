"""Text out of template files: pages and cards."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def render(path: Path, *, html: bool = False, **values: Any) -> str:
    """Fill the template in `path`; a name that it uses and nobody gives is an error. `html` escapes every value."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(path.parent),
        autoescape=html,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=not html,
    )
    return environment.get_template(path.name).render(values)
