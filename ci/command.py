"""How a command of ci/ ends: its error is one message on stderr, its code that of common/errors.py."""

from __future__ import annotations

from collections.abc import Callable

import click

from common.errors import RecipeError


def run(command: Callable[[], object]) -> None:
    """Run a command of this process, in click or not."""
    try:
        command()
    except RecipeError as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(error.code) from None
