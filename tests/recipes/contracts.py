"""What every folder of recipes/ keeps to, whoever wrote it. Nothing is trained here: test_training.py does that.

A contract is a function of a recipe's folder that raises where it is broken; `hold` says which one it was.
"""

from __future__ import annotations

import ast
import functools
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from common import config as configs
from common import hardware
from common.config.layers import Key, Layer, dotted, flatten, read_file, to_yaml
from common.data.texts import locked
from common.errors import MachineError, RecipeError, UsageError
from common.model import llama
from tests.support.commands import House, Wrong, shown
from tools.data.licence import CARDS, LICENCE_LINE
from tools.launch import after_run, dry_run
from tools.launch.resolve import resolve
from tools.results import schema as results

FILES = ("config.yaml", "dataset.py", "train.py", "README.md", "results.yaml")
SPLITS_BADLY = re.compile(r"does not divide by the \d+ devices|the mesh \[.*\] has \d+ devices")
NOT_ON_A_BOARD = ("torch", "transformers", "peft", "accelerate")  # its image has none of them
NOT_PLAIN = ("importlib", "runpy", "sys", "imp")  # ways round a plain import
OF_OTHERS = ("recipes", "tests", "ci", "bench", "engines", "tools")
BESIDE = (1, "dataset")  # `from .dataset import ...`: how many folders up, and what
IN_THE_LOOP = {
    "train_step": "it updates nothing",
    "record": "metrics.jsonl stays empty",
    "evaluate": "nothing says whether it learns: `if run.evaluation_due(step): run.evaluate(step)`",
    "save": "what it learned is lost when it is stopped: `if run.checkpoint_due(step): run.save(step)`",
}
AROUND_THE_LOOP = {
    "open_run": "it opens no run",
    "evaluate": "there is nothing to compare with: run.evaluate(step=0) before the first step",
    "finish": "the last step may go without evaluation and checkpoint",
}
PATHS = ("data_config.source", "data_config.corpus", "eval_config.prompts")
COUNT = re.compile(r"# ([\d,]+) parameters")


class Broken(AssertionError):
    """A recipe does not keep a contract."""


def need(holds: object, what: str) -> None:
    if not holds:
        raise Broken(what)


def hold(contract: Callable[[Path], None], recipe: Path) -> None:
    """Raises Broken with the recipe, the contract's name and first line, and what is wrong."""
    try:
        contract(recipe)
    except (Broken, RecipeError, Wrong) as error:
        says = (contract.__doc__ or "").partition("\n")[0]
        raise Broken(f"{recipe.name} breaks the contract {contract.__name__!r} ({says}): {error}") from None


# --- the folder -------------------------------------------------------------------------------------------------------


def folder(recipe: Path) -> None:
    """The files are there, config.yaml begins with what the recipe does, results.yaml is its own."""
    missing = [name for name in FILES if not (recipe / name).is_file()]
    need(not missing, f"{', '.join(missing)} missing")
    first = (recipe / "config.yaml").read_text(encoding="utf-8").partition("\n")[0]
    need(re.match(r"# \S", first), f"config.yaml:1: a comment that says what the recipe does, not {first!r}")
    results.load(recipe)


def readme(recipe: Path) -> None:
    """README.md has the recipe's name as its title, a command that runs it, and a row that says what ran where."""
    page = recipe / "README.md"
    text = page.read_text(encoding="utf-8")
    need(text.startswith(f"# {recipe.name}\n"), f"README.md:1: the title is not `# {recipe.name}`")
    need(re.search(r"^\| status \|", text, re.MULTILINE), "README.md: no `| status |` row for CPU and board")
    with tempfile.TemporaryDirectory() as scratch:
        house = House(Path(scratch))
        calls = [words for command in shown(page) for words in house.forwarded(command.words)]
    runs = [words[1] for words in calls if words[:1] == ["run"] and len(words) > 1]
    need(recipe.name in (Path(name).name for name in runs), "README.md: no command in it runs this recipe")


def licence(recipe: Path) -> None:
    """Whose data it is stands beside it: a line "License: ..." in a README or card; corpora.yaml says it of its own."""
    for data in {layer.get("data_config.corpus") or layer.get("data_config.source") for _, layer in layers(recipe)}:
        if data is None or data in locked():
            continue
        cards = [place / name for place in (recipe / data, (recipe / data).parent, recipe) for name in CARDS]
        named = any(
            card.stem == "LICENSE" or any(map(LICENCE_LINE.match, card.read_text(encoding="utf-8").splitlines()))
            for card in cards
            if card.is_file()
        )
        need(named, f"nothing names a licence of {data}: write a line `License: ...` into the README.md beside it")


def independent(recipe: Path) -> None:
    """It imports `common` and its own dataset.py, never another recipe, and reads no file outside its folder."""
    others = [path.parent.name for path in recipe.parent.glob("*/config.yaml") if path.parent != recipe]
    for path in sorted(recipe.rglob("*.py")):
        for node, module in imports(path):
            where, top = f"{path.name}:{node.lineno}", module.partition(".")[0]
            if path.name == "train.py":
                plain = top in ("common", "__future__", "") or top in sys.stdlib_module_names
                need(plain, f"{where}: it imports {module}; train.py imports `common` and its own dataset")
            need(top not in OF_OTHERS, f"{where}: it imports {module}; a recipe imports `common`")
            need(top not in NOT_PLAIN, f"{where}: it imports {module}; a recipe imports `common`, and that plainly")
            need(top not in NOT_ON_A_BOARD, f"{where}: it imports {module}, which a board's image does not have")
            need(top not in [name.replace("-", "_") for name in others], f"{where}: it imports the recipe {module}")
        for line, text in texts(path):
            named = [name for name in others if name in Path(text).parts]
            need(not named and ".." not in Path(text).parts, f"{path.name}:{line}: it reaches for {text}")
    for path, layer in layers(recipe):
        for key in PATHS:
            value = layer.get(key)
            inside = not isinstance(value, str) or (recipe / value).resolve().is_relative_to(recipe)
            need(inside, f"{path.name}: {key} is outside the recipe's folder: {value}")


def imports(path: Path) -> Iterator[tuple[ast.stmt, str]]:
    """Every import with its module; "" for one of the dataset.py beside it. Raises Broken for another relative one."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            beside = (node.level, node.module) == BESIDE
            need(beside, f"{path.name}:{node.lineno}: it imports relatively what is not its own dataset.py")
            yield node, ""
        elif isinstance(node, ast.ImportFrom):
            yield node, str(node.module)


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """The line and value of every text constant of one line: docstrings of more may name what they like."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" not in node.value:
            yield node.lineno, node.value


# --- the loop ---------------------------------------------------------------------------------------------------------


def loop(recipe: Path) -> None:
    """train.py has the whole loop in sight: steps that train, record, evaluate and save; then finish and export."""
    tree = ast.parse((recipe / "train.py").read_text(encoding="utf-8"))
    trains = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train"]
    need(len(trains) == 1 and len(trains[0].args.args) == 1, "train.py: no function train(launch)")
    inside = [node for node in ast.walk(trains[0]) if isinstance(node, ast.For) and "steps" in calls(node.iter)]
    need(len(inside) == 1, "train.py: no loop `for step in run.steps():`")
    around = calls(trains[0], inside[0])
    for found, wanted, place in (
        (calls(inside[0]), IN_THE_LOOP, "its loop never calls"),
        (around, AROUND_THE_LOOP, "around its loop it never calls"),
    ):
        for name, without in wanted.items():
            need(name in found, f"train.py:{inside[0].lineno}: {place} {name}: {without}")
    last = trains[0].body[-1]
    finishes = isinstance(last, ast.With) and "finish" in calls(last.body[-1])
    need(finishes, f"train.py:{last.lineno}: `with open_run(...) as run:` does not end with run.finish()")
    constants = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
    named = after_run.known_steps(ast.literal_eval(constants.get("AFTER_RUN", ast.Tuple([]))), "train.py")
    need("export" in named, "train.py: no export in AFTER_RUN: nobody else can load what was trained")


def calls(tree: ast.AST, but: ast.AST | None = None) -> set[str]:
    """Names of what is called in a tree, without one part of it."""
    left = {id(node) for node in ast.walk(but)} if but else set()
    found = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call) and id(node) not in left]
    return {node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "") for node in found}


# --- the config -------------------------------------------------------------------------------------------------------


def schema(recipe: Path) -> None:
    """config.yaml, presets and overlays resolve on every board, or say that its devices do not divide the batch."""
    for preset in (None, *presets(recipe)):
        boards = dict(resolved(recipe, () if preset is None else (f"model_config.preset={preset}",)))
        need("cpu" in boards, f"it does not resolve on a CPU (preset {preset}), where everybody can train it")


def dry_runs(recipe: Path) -> None:
    """`recipe run --dry-run` says on every board what a run there would do."""
    for board, _ in resolved(recipe):
        with mock.patch.object(dry_run, "check_engine", side_effect=MachineError("no engine is asked")):
            lines = list(dry_run.describe(resolve(recipe, hw=board, require_present=False), None))
        says = [line for line in lines if line.startswith("would run: ")]
        need(says, f"its dry run on {board} does not say what would run")


def counted(recipe: Path) -> None:
    """A preset that is a model's shape begins with its number of parameters, and its heads suit a board."""
    for path, layer in layers(recipe):
        shape = layer.get("model_config.architecture")
        if path.parent.name != "presets" or not isinstance(shape, dict):
            continue
        said = COUNT.match(path.read_text(encoding="utf-8"))
        count, width = llama.parameters(shape), shape["hidden_size"] // shape["num_attention_heads"]
        need(width % 32 == 0, f"{path.name}: heads of {width}; a board's rotary embedding wants a multiple of 32")
        need(said and said[1] == f"{count:,}", f"{path.name}:1: should begin with `# {count:,} parameters`")


def overlays(recipe: Path) -> None:
    """Every key of hw/<board>.yaml changes something there; what restates the recipe says why, on its line."""
    for path, layer in layers(recipe):
        if path.parent.name != "hw":
            continue
        boards = [board for board in hardware.table().values() if path.stem in (board.name, board.is_cpu and "cpu")]
        lines = path.read_text(encoding="utf-8").splitlines()
        for key, _ in flatten(layer.tree):
            if " #" in lines[int(layer.where[key].rpartition(":")[2]) - 1]:
                continue
            same = [board.name for board in boards if without(recipe, path, key, board) == dump(recipe, board)]
            need(len(same) < len(boards), f"{layer.where[key]}: {dotted(key)} changes nothing on {', '.join(same)}")


def without(recipe: Path, path: Path, key: Key, board: hardware.Hardware) -> dict[str, Any] | str:
    """The resolved config where one file lacks one key; what is wrong with it where it is refused."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / recipe.name
        shutil.copytree(recipe, copy, ignore=shutil.ignore_patterns("data", "results"))
        tree = read_file(path).tree
        *above, last = map(str, key)
        functools.reduce(lambda section, name: section[name], above, tree).pop(last)
        (copy / path.relative_to(recipe)).write_text(to_yaml(tree), encoding="utf-8")
        return dump(copy, board)


def dump(recipe: Path, board: hardware.Hardware) -> dict[str, Any] | str:
    try:
        return configs.load(recipe, board).dump()
    except UsageError as error:
        return error.what


def layers(recipe: Path) -> list[tuple[Path, Layer]]:
    """config.yaml, presets and overlays, as they are written."""
    files = [recipe / "config.yaml", *sorted(recipe.glob("presets/*.yaml")), *sorted(recipe.glob("hw/*.yaml"))]
    return [(path, read_file(path)) for path in files]


def presets(recipe: Path) -> list[str]:
    return sorted(path.stem for path in recipe.glob("presets/*.yaml"))


def resolved(recipe: Path, overrides: tuple[str, ...] = ()) -> Iterator[tuple[str, configs.Config]]:
    """Each board with its config; not those whose devices the batch or mesh does not fit. Raises other mistakes."""
    for board in hardware.table().values():
        try:
            yield board.name, configs.load(recipe, board, overrides)
        except UsageError as error:
            if not SPLITS_BADLY.search(error.what):
                raise


CONTRACTS = (folder, readme, licence, independent, loop, schema, dry_runs, counted, overlays)
