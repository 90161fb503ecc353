"""Every command that a page shows is understood, and so is its config; a recipe that is not here is no mistake."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.paths import ROOT
from tests.doubles.tiny_recipe import FINE_TUNE
from tests.support.commands import House, NotHere, Shown, Wrong, pages, shown
from tools.recipes import RECIPES

COMMANDS = [command for page in pages() for command in shown(page)]
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


@pytest.fixture(scope="module", autouse=True)
def house(tmp_path_factory) -> Iterator[House]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HW", "RECIPES_SYSFS_ROOT", "RECIPES_CONTAINER"):
            patch.delenv(name, raising=False)
        yield House(tmp_path_factory.mktemp("house"))


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_command_of_a_page_works(house, command):
    try:
        house.check(command)
    except NotHere as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_a_link_leads_somewhere(page):
    """But into a recipe that was deleted: its other pages need no edit for that."""
    lost = []
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        path = (page.parent / target).resolve()
        in_recipe = path.is_relative_to(RECIPES) and path != RECIPES
        gone = in_recipe and not (RECIPES / path.relative_to(RECIPES).parts[0]).is_dir()
        if ":" not in target and not path.exists() and not gone:
            lost.append(target)
    assert not lost


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("make recipe-fintune", "No rule to make target"),
        ("make recipe-finetune STEP=5", "takes no STEP"),
        ("make recipe", "which recipe?"),
        ("recipe run tests/doubles/recipes/fine_tune --step 5", "No such option"),
        ("recipe train tests/doubles/recipes/fine_tune", "No such command"),
        ("recipe data check tests/doubles/recipes/fine_tune --stict", "No such option"),
        ("recipe run tests/doubles/recipes/fine_tune --set training_config.lr=1", "did you mean"),
        ("make recipe NAME=tests/doubles/recipes/fine_tune SET=training_config.seed=x", "valid integer"),
        (".venv/bin/recipe plan tests/doubles/recipes/fine_tune --hw n151", "n151"),
    ],
)
def test_a_command_that_does_not_work_is_found(house, tmp_path, text, wrong):
    page = tmp_path / "README.md"
    page.write_text(f"# A page\n\n```\n{text}  # a remark\n```\n")
    (command,) = shown(page)
    assert command.line == 4
    with pytest.raises(Wrong, match=wrong):
        house.check(command)


def test_what_a_page_shows_and_what_it_does_not(tmp_path):
    page = tmp_path / "README.md"
    prose, other = "make prose, or `make z`\n\n", "```yaml\nmake: this\n```\n\n"
    block = "```sh\n$ make a X=1 \\\n    Y='2; 3' && make b; ls\nls\nmake c RUN=runs/<...> 2>x | head  # make d\n```\n"
    page.write_text(prose + other + block)
    assert list(shown(page)) == [
        Shown(page, 1, ("make", "z")),
        Shown(page, 8, ("make", "a", "X=1", "Y=2; 3")),
        Shown(page, 8, ("make", "b")),
        Shown(page, 11, ("make", "c", "RUN=runs/<...>")),
    ]


def test_a_recipe_that_is_not_here_is_told_apart_from_a_mistake(house):
    for words in (("make", "recipe", "NAME=gone"), ("recipe", "run", "gone", "--steps", "3")):
        with pytest.raises(NotHere, match="the recipe gone is not here"):
            house.check(Shown(Path("x"), 1, words))
    with pytest.raises(Wrong):
        house.check(Shown(Path("x"), 1, ("recipe", "run", "gone", "--stepps", "3")))
    house.check(Shown(Path("x"), 1, ("recipe", "run", str(FINE_TUNE), "--hw", "n150", "--steps", "3")))
