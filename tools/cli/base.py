"""`recipe base`: the models of the Hub that a recipe pins."""

from __future__ import annotations

import click

from tools.cli.options import json_option
from tools.recipes import find_recipe

recipe_option = click.option("--recipe", "name", required=True, metavar="RECIPE", help="The recipe that pins it.")


@click.group()
def base() -> None:
    """Pin models of the Hugging Face Hub for a recipe, in models.lock.yaml of its folder."""


@base.command()
@click.argument("model", metavar="REPO[@REVISION]")
@recipe_option
@click.option("--replace", is_flag=True, help="Put it in the place of the commit that is pinned now.")
def add(model: str, name: str, replace: bool) -> None:
    """Pin a Llama of the Hub: its commit, the sha256 of each file, licence and shape. Downloads no weights."""
    from tools.bases import verbs

    verbs.add(find_recipe(name), model, click.echo, replace=replace)


@base.command("list")
@json_option
def list_(as_json: bool) -> None:
    """List every pinned base: where from, how large, its licence, whether it is here, what names it."""
    from tools.bases import verbs

    verbs.print_list(as_json, click.echo)


@base.command()
@click.option("--recipe", "name", metavar="RECIPE", help="Its own pins alone; without: every pin.")
def check(name: str | None) -> int:
    """Hash the bases on this machine again, and ask the Hub for their commits. Exit code 6 where one is not so."""
    from tools.bases import verbs

    return verbs.check(find_recipe(name) if name else None, click.echo)


@base.command()
@click.argument("model", metavar="REPO")
@recipe_option
def remove(model: str, name: str) -> None:
    """Take a pin out of a recipe's lock; refused while its configs name it."""
    from tools.bases import verbs

    verbs.remove(find_recipe(name), model, click.echo)
