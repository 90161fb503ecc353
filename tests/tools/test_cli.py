"""The command: what it imports, what it forwards, and the one message and exit code of each kind of error."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest

from common import recipe as recipes
from common.errors import (
    DataError,
    MachineError,
    RecipeError,
    Stopped,
    TrainingError,
    UsageError,
    VerificationError,
)
from tests.doubles.machines import fake_host
from tests.doubles.tiny_recipe import FINE_TUNE
from tools.cli import main
from tools.launch.after_run import train_here
from tools.launch.resolve import resolve
from tools.recipes import find_recipe

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "datasets", "pyarrow", "peft", "safetensors", "ttnn", "ttml", "numpy", "pydantic")


def recipe(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    """Run the console script in this process: its exit code, standard output and standard error."""
    monkeypatch.setattr(sys, "argv", ["recipe", *arguments])
    with pytest.raises(SystemExit) as ended:
        main.main()
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


@pytest.fixture(autouse=True)
def own_recipes(monkeypatch) -> None:
    monkeypatch.setattr("tools.recipes.RECIPES", FINE_TUNE.parent)


@pytest.fixture
def command(monkeypatch, capsys):
    return lambda *arguments: recipe(monkeypatch, capsys, *arguments)


@pytest.fixture
def failing(command, monkeypatch):
    """Run a command whose verb ends with `error`."""

    def run(error: BaseException, *options: str) -> tuple[int, str, str]:
        def fail() -> None:
            raise error

        monkeypatch.setitem(main.recipe.commands, "fail", click.Command("fail", callback=fail))
        return command(*options, "fail")

    return run


# --- imports ------------------------------------------------------------------------------------------------------


def imported_by(code: str) -> set[str]:
    """The modules that a fresh Python has after `code`."""
    script = f"{code}\nimport sys; print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stderr.splitlines()[-1].split()}


HELP = """import sys
from tools.cli import main
sys.argv = ['recipe', '--help']
try: main.main()
except SystemExit: pass"""


def test_help_imports_nothing_heavy():
    """Under half a second: Python and click, nothing else."""
    found = imported_by(HELP)
    assert "click" in found
    assert not found & {*HEAVY, "yaml", "rich", "jinja2"}


def test_the_training_path_is_planned_without_an_engine():
    """Whatever a config, its data and a resume need is there without torch: errors come within a second or two."""
    modules = ["common.train.run", "common.train.resume", "engines.cpu", "engines.registry", "tools.launch.resolve"]
    code = "\n".join(f"import {name}" for name in modules)
    assert not imported_by(code) & {"torch", "transformers", "datasets", "pyarrow", "peft", "ttnn", "ttml"}


def test_a_board_s_host_needs_no_numpy_to_launch_a_container():
    """Nor to say what it would launch: requirements/launcher.txt has none."""
    code = "import tools.doctor.machine, tools.launch.dry_run, tools.launch.run, tools.launch.stop"
    assert not imported_by(code) & {"torch", "numpy", "safetensors"}


def test_every_module_but_the_engine_s_imports_without_torch():
    names = sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for room in ("common", "tools")
        for path in (ROOT / room).rglob("*.py")
        if not path.stem.startswith("__")
    )
    assert "tools.export.export" in names
    code = "\n".join(f"import {name}" for name in names)
    assert not imported_by(code) & {"torch", "transformers", "datasets", "pyarrow", "peft", "ttnn", "ttml"}


# --- exit codes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RecipeError("x"), 1),
        (UsageError("x"), 2),
        (DataError("x"), 3),
        (MachineError("x"), 4),
        (TrainingError("x"), 5),
        (VerificationError("x"), 6),
        (Stopped("x"), 75),
        (MemoryError(), 5),
        (KeyboardInterrupt(), 130),
        (RuntimeError("odd"), 1),
        (click.UsageError("x"), 2),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_each_kind_of_error_has_its_code_and_no_traceback(failing, error, code):
    got, out, err = failing(error)
    assert got == code
    assert out == ""
    assert err.strip()
    assert "Traceback" not in err


def test_a_message_has_what_where_and_what_to_do(failing):
    error = DataError("row 7 is empty", where="rows.jsonl:7", todo="delete it")
    assert failing(error)[2] == "error: row 7 is empty\n  where: rows.jsonl:7\n  to do: delete it\n"


def test_a_stop_on_request_is_no_error(failing):
    assert failing(Stopped("stopped after step 3"))[2].startswith("stopped after step 3")


def test_a_bug_is_called_one(failing):
    assert failing(ZeroDivisionError("division by zero"))[2].startswith("bug: ZeroDivisionError: division by zero")


def test_out_of_memory_in_torch_is_no_bug(failing):
    text = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried ..."
    code, _, err = failing(RuntimeError(text))
    assert code == 5
    assert "out of memory" in err


def test_debug_shows_the_traceback(monkeypatch):
    def fail() -> None:
        raise DataError("x")

    monkeypatch.setitem(main.recipe.commands, "fail", click.Command("fail", callback=fail))
    for argv, variable in ((["recipe", "--debug", "fail"], "0"), (["recipe", "fail"], "1")):
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.setenv("RECIPES_DEBUG", variable)
        with pytest.raises(DataError):
            main.main()


# --- arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["run"],
        ["run", "fine_tune", "--steps", "0"],
        ["run", "fine_tune", "--steps", "many"],
        ["run", "fine_tune", "--stop-at", "-1"],
        ["run", "fine_tune", "--epochs", "3"],
        ["run", "no-such-recipe"],
        ["run", "fine_tune", "--hw", "n151"],
        ["config", "show", "fine_tune", "--set", "nonsense"],
        ["export", "/no/such/run"],
        ["generate", "/no/such/run"],
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_is_code_2_with_one_message(command, arguments):
    code, _, err = command(*arguments)
    assert code == 2, err
    assert err.strip()
    assert "Traceback" not in err


def test_an_unknown_recipe_lists_the_known(command):
    code, _, err = command("run", "finetun")
    assert code == 2
    assert "fine_tune" in err


def test_run_hands_over_what_was_typed(command, monkeypatch, tmp_path):
    launches: list[Any] = []
    monkeypatch.setattr("tools.launch.run.in_processes", lambda launch, _job, _say: launches.append(launch))
    monkeypatch.setattr("tools.launch.run.fetch_pinned", lambda *_: None)
    settings = ("training_config.seed=1", "eval_config.every=1")
    arguments = [*"--hw cpu --steps 7 --stop-at 3 --resume never --accept-changes".split()]
    arguments += [word for setting in settings for word in ("--set", setting)]
    assert command("run", "fine_tune", *arguments, "--out", str(tmp_path))[0] == 0
    (launch,) = launches
    assert launch.recipe_dir == FINE_TUNE
    assert (launch.hw.name, launch.config.training.max_steps, launch.stop_at) == ("cpu", 7, 3)
    assert launch.overrides == settings
    assert (launch.resume, launch.accept_changes, launch.out) == ("never", True, tmp_path)
    assert launch.command[:3] == ("recipe", "run", "fine_tune")


def test_run_takes_the_board_from_the_environment_and_resumes_by_itself(command, monkeypatch, tmp_path):
    launches: list[Any] = []
    monkeypatch.setattr("tools.launch.run.in_processes", lambda launch, _job, _say: launches.append(launch))
    monkeypatch.setattr("tools.launch.run.fetch_pinned", lambda *_: None)
    monkeypatch.setenv("RECIPES_SYSFS_ROOT", str(fake_host(tmp_path, "n300")))
    monkeypatch.setenv("HW", "n300")
    command("run", "fine_tune", "--no-container")
    monkeypatch.setenv("RECIPES_SYSFS_ROOT", str(tmp_path / "nothing"))
    monkeypatch.setenv("HW", "")
    command("run", "fine_tune", "--no-container")
    assert [launch.hw.name for launch in launches] == ["n300", "cpu"]
    assert {launch.resume for launch in launches} == {"auto"}
    assert {launch.out for launch in launches} == {ROOT / "runs"}, "whatever the working directory"


def test_a_recipe_may_be_a_folder_elsewhere(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").write_text("{}")
    assert find_recipe(str(tmp_path / "mine")) == tmp_path / "mine"


def test_a_script_may_hold_a_dataclass(tmp_path):
    (tmp_path / "train.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    b: int\n"
    )
    assert recipes.load(tmp_path, "train").A(1).b == 1


def test_the_script_of_each_recipe_gets_the_dataset_beside_it(tmp_path):
    for name in ("one", "two-b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.py").write_text("from .dataset import name\n")
        (tmp_path / name / "dataset.py").write_text(f"name = {name!r}\n")
    assert [recipes.load(tmp_path / name, "train").name for name in ("one", "two-b", "one")] == ["one", "two-b", "one"]


@pytest.mark.parametrize(
    ("script", "beside", "where"),
    [("from .dataset import a\n", "\na = b\n", "dataset.py:2"), ("\n\na = b\n", "", "train.py:3")],
)
def test_a_fault_in_a_script_is_named_with_its_line(tmp_path, script, beside, where):
    (tmp_path / "train.py").write_text(script)
    (tmp_path / "dataset.py").write_text(beside)
    with pytest.raises(DataError, match="NameError: name 'b' is not defined") as error:
        recipes.load(tmp_path, "train")
    assert str(error.value.where) == str(tmp_path / where)


def test_a_step_after_the_run_that_nobody_knows_is_refused_before_anything_is_trained(tmp_path):
    launch = replace(resolve(FINE_TUNE, hw="cpu"), recipe_dir=tmp_path)
    (tmp_path / "train.py").write_text("AFTER_RUN = ('exprot',)\n")
    with pytest.raises(UsageError, match="'exprot'; known: export, before_after, never_moved"):
        train_here(launch)


def test_a_recipe_without_a_script_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"no train.py"):
        recipes.load(tmp_path, "train")


def test_config_show_prints_the_resolved_config_of_any_board(command):
    pytest.importorskip("pydantic")
    import yaml

    code, out, _ = command("config", "show", "fine_tune", "--hw", "galaxy", "--steps", "5")
    assert code == 0
    shown = yaml.safe_load(out)
    assert shown["hw"] == "galaxy"
    assert shown["training_config"]["max_steps"] == 5


def test_the_config_schema_says_what_every_key_is(command):
    code, out, _ = command("config", "schema")
    assert code == 0
    schema = json.loads(out)
    assert {"recipe", "hw"}.isdisjoint(schema["properties"])
    assert "training_config" in schema["properties"]
    parts = [schema, *schema["$defs"].values()]
    assert not [name for part in parts for name, value in part["properties"].items() if not value.get("description")]
    assert all(part["additionalProperties"] is False for part in parts)
    assert not [part for part in parts if "required" in part]


def test_dry_run_trains_nothing(command, monkeypatch):
    monkeypatch.setattr("common.recipe.load", pytest.fail)
    code, out, _ = command("run", "fine_tune", "--hw", "n150", "--steps", "7", "--set", "a_b.c=1", "--dry-run")
    assert code == 2, "a config that a run would refuse"
    seed = "training_config.seed=1"
    code, out, _ = command("run", "fine_tune", "--hw", "n150", "--steps", "7", "--set", seed, "--dry-run")
    assert code == 0
    printed = next(line for line in out.splitlines() if line.startswith("would run: recipe run fine_tune"))
    assert "--hw n150 --steps 7" in printed
    assert f"--set {seed}" in printed


def test_a_dry_run_misses_a_base_that_is_neither_pinned_nor_a_folder(command):
    code, out, _ = command("run", "fine_tune", "--hw", "cpu", "--set", "model_config.base=/nowhere", "--dry-run")
    assert code == 0
    assert "a real run would lack:\n  no base model called '/nowhere'" in out


def test_several_hosts_are_no_matter_for_a_container(command):
    code, _, err = command("run", "fine_tune", "--hw", "cpu-x2", "--container", "--nnodes", "2")
    assert code == 2
    assert "--no-container" in err


def test_python_m_common_is_the_same_command():
    done = subprocess.run(
        [sys.executable, "-m", "tools.cli", "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "Exit codes" in done.stdout


def test_a_reader_that_goes_away_is_no_bug():
    command = f"{sys.executable} -m tools.cli config show {FINE_TUNE} --hw cpu | head -1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "bug" not in done.stderr
    assert "Traceback" not in done.stderr
