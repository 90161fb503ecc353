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
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)")


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
    """To a file or folder, and to a heading of a page; but into a recipe that was deleted, whose links need no edit."""
    assert not list(lost(page))


def lost(page: Path) -> Iterator[str]:
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        path = (page.parent / target).resolve() if target else page
        in_recipe = path.is_relative_to(RECIPES) and path != RECIPES
        gone = in_recipe and not (RECIPES / path.relative_to(RECIPES).parts[0]).is_dir()
        if ":" in target or gone:
            continue
        if not path.exists() or (anchor and anchor not in anchors(path / "README.md" if path.is_dir() else path)):
            yield f"{target}#{anchor}"


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to a page's headings: small letters, hyphens for spaces, no other punctuation."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_a_link_that_leads_nowhere_is_found(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/README.md").write_text("# It is `so`, here\n")
    page = tmp_path / "page.md"
    page.write_text(
        "## Two words\n[a](#two-words) [b](folder#it-is-so-here) [c](folder/README.md) [d](https://x.org/#y)\n"
    )
    assert not list(lost(page))
    page.write_text("## Two words\n[a](#two) [b](folder/README.md#so) [c](gone.md) [d](gone#x)\n")
    assert list(lost(page)) == ["#two", "folder/README.md#so", "gone.md#", "gone#x"]


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
