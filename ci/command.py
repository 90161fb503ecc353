"""How a command of ci/ ends: its error is one message on stderr, its code that of common/errors.py."""

from __future__ import annotations

import click

from common.errors import RecipeError


def run(command: click.Command) -> None:
    """Run it with this process's arguments."""
    try:
        command()
    except RecipeError as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(error.code) from None
