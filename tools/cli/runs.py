"""`recipe runs` and `recipe report`: look at runs, compare them, make room."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from common.errors import UsageError
from tools.cli.options import RUN, json_option, out_option

GGUF_TYPES = ("f32", "f16", "q8_0")  # as tools/export/gguf/file.py has them; here so that no words need numpy

if TYPE_CHECKING:
    from tools.runs.compare import Verdict
    from tools.runs.folder import RunFolder


@click.command()
@click.argument("folders", metavar="[RUN]...", type=RUN, nargs=-1)
@out_option
def report(folders: tuple[Path, ...], out: Path) -> None:
    """Write report.html of each RUN; without one, the page over all runs."""
    from tools.report import pages

    for folder in folders:
        click.echo(pages.write_run(folder))
    if not folders:
        path, count = pages.write_overview(out)
        click.echo(f"{path} ({count} runs)")


@click.command()
@click.argument("run", type=RUN)
@click.option("--check", is_flag=True, help="Only load the export again and compare it with the run; GGUF files, too.")
@click.option("--gguf", is_flag=True, help="Also write it as a GGUF file, for llama.cpp and Ollama, and prove that.")
@click.option(
    "--type", "kind", type=click.Choice(GGUF_TYPES), help="With --gguf: how weights are stored.  [default: f16]"
)
@click.option("--readers", is_flag=True, help="Have it opened by other software: all of docs/exports.md, or each NAME.")
@click.argument("names", metavar="[NAME]...", nargs=-1)
def export(run: Path, check: bool, gguf: bool, kind: str | None, readers: bool, names: tuple[str, ...]) -> None:
    """Write a run's Hugging Face folders, and prove them by reloading."""
    if names and not readers:
        raise UsageError(
            f"what is {names[0]!r}? One run is exported at a time", todo="--readers takes names of readers"
        )
    if readers and (check or gguf):
        raise UsageError("--readers opens the folders that were written", todo="leave out --check and --gguf")
    if check and gguf:
        raise UsageError("--check looks at all files there are", todo="leave out --gguf, or --check")
    if kind and not gguf:
        raise UsageError("--type says how weights are stored in a GGUF file", todo="add --gguf")
    if gguf:
        from tools.export.gguf.make import export_gguf

        export_gguf(run, kind or "f16", click.echo)
    elif readers:
        from tools.export.reading import export_readers

        export_readers(run, names, click.echo)
    elif check:
        from tools.export.gguf.make import check_all

        check_all(run, click.echo)
    else:
        from tools.export.export import export_folder

        export_folder(run, click.echo)


@click.command()
@click.argument("target", type=RUN)
@click.option("--prompt", "prompts", multiple=True, help="Ask this; repeatable. Without: a prompt loop.")
@click.option("--base", is_flag=True, help="Show the untuned model's answer, too.")
@click.option("--temperature", type=float)
@click.option("--top-k", type=int)
@click.option("--top-p", type=float)
@click.option("--repetition-penalty", type=float)
@click.option("--max-new-tokens", type=int)
@click.option("--seed", type=int, default=0, show_default=True)
def generate(target: Path, prompts: tuple[str, ...], base: bool, seed: int, **sampling: float | None) -> None:
    """Talk to a run, or to any Hugging Face Llama folder."""
    from tools.generate.chat import talk

    talk(target, prompts, base=base, seed=seed, sampling=sampling)


@click.command()
@click.argument("run", type=RUN)
@click.option("--record", is_flag=True, help="Write the run's figures into the recipe's results.yaml.")
@click.option(
    "--band-from",
    "others",
    multiple=True,
    type=RUN,
    help="With --record: a run that shows how far figures may stray; repeatable.",
)
@click.option("--speed", is_flag=True, help="With --record: tokens/s too; this machine did nothing else.")
@json_option
def grade(run: Path, record: bool, others: tuple[Path, ...], speed: bool, as_json: bool) -> None:
    """Hold a run against the recorded figures of its training. Exit code 6 where one fails."""
    if (others or speed) and not record:
        raise UsageError("--band-from and --speed say what is recorded", todo="add --record")
    if record:
        from tools.results.record import record as write

        write(run, others, speed, click.echo)
        return
    from tools.results.grade import print_grade

    print_grade(run, as_json, click.echo)


@click.command()
@click.argument("run", type=RUN)
@out_option
def repro(run: Path, out: Path) -> None:
    """Run a run again from its manifest, and compare: bit for bit where that can be expected."""
    from tools.results.repro import repro as run_again

    run_again(run, out, click.echo)


@click.command()
@click.argument("target", metavar="LOG|RUN", type=click.Path(path_type=Path, exists=True))
def explain(target: Path) -> None:
    """Look in a log, or a run's folder, for what is known to go wrong, and say what to do."""
    from tools.runs.explain import print_explanation

    print_explanation(target, click.echo)


@click.group()
def runs() -> None:
    """List, show, compare and prune runs."""


@runs.command("list")
@out_option
@json_option
def list_runs(out: Path, as_json: bool) -> None:
    """Print every run, the newest first: how it ended, how far it came, what it reached."""
    from tools.runs.folder import runs_in

    records = list(runs_in(out))
    if as_json:
        print_json([summary(record) for record in records])
    elif records:
        print_table(records)
    else:
        click.echo(f"no runs in {out}")


@runs.command()
@click.argument("run", type=RUN)
def show(run: Path) -> None:
    """Print a run's figures and draw its loss."""
    from rich.console import Console
    from rich.text import Text

    from tools.report import facts, terminal
    from tools.runs.folder import read_run

    record = read_run(run)
    console = Console(highlight=False, soft_wrap=True)
    console.print(Text(f"{record.name}: {record.state}", style="bold"))
    if record.state in ("failed", "stopped"):
        console.print(Text(facts.cause(record), style="yellow"))
    for name, value, what in facts.tiles(record):
        console.print(Text(f"{name:<22} {value}  ({what})"))
    console.print()
    for line in terminal.loss_lines(record, min(console.width, 110), console.is_terminal):
        console.print(Text.from_ansi(line))
    for fault in record.faults:
        console.print(Text(f"note: {fault}", style="yellow"))


@runs.command()
@click.argument("folders", metavar="RUN RUN...", type=RUN, nargs=-1, required=True)
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Also draw the curves, into this file.")
@json_option
def compare(folders: tuple[Path, ...], html: Path | None, as_json: bool) -> None:
    """Compare runs with the first one: figures, config, and whether a gap is more than noise.

    Losses of other tokens, tokenizers or lengths are never compared; bits per byte are, on the same text.
    """
    from tools.report import pages
    from tools.runs.compare import SEED_NOTE, config_table, verdict
    from tools.runs.folder import read_run

    if len(folders) < 2:
        raise UsageError("one run has nothing to be compared with", todo="recipe runs compare RUN RUN...")
    records = [read_run(folder) for folder in folders]
    verdicts = [verdict(records[0], other) for other in records[1:]]
    if as_json:
        print_json({"runs": [*map(summary, records)], "verdicts": [*map(as_dict, verdicts)]})
    else:
        print_table(records)
        print_config(config_table(records))
        for found in verdicts:
            click.secho(f"\n{found.other.name} beside {records[0].name}:", bold=True)
            click.secho(found.sentence(), fg="yellow" if found.unlike else None)
        click.echo(f"\n{SEED_NOTE}")
    if html:
        click.echo(pages.write_comparison(records, html), err=as_json)


@runs.command()
@click.argument("folders", metavar="[RUN]...", type=RUN, nargs=-1)
@out_option
@click.option("--keep", type=click.IntRange(min=0), default=1, show_default=True, help="Newest checkpoints to keep.")
@click.option("--exports", is_flag=True, help="Delete export/, too.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def prune(folders: tuple[Path, ...], out: Path, keep: int, exports: bool, yes: bool) -> None:
    """Delete checkpoints of each RUN, or of all runs: only the newest stays, with keep_best the best, too.

    Metrics, config, manifest, log, samples and reports stay as they are; a run that is going on is not touched.
    """
    from common.files import disk_errors
    from tools.runs.folder import read_run, runs_in
    from tools.runs.prune import locked, removable, remove, shown_size

    records = [read_run(folder) for folder in folders] or list(runs_in(out))
    with disk_errors("delete checkpoints", out), contextlib.ExitStack() as held:
        going = [
            folder
            for record in locked(records, held, click.echo)
            for folder in removable(record, keep, exports, bool(folders), click.echo)
        ]
        if not going:
            click.echo("nothing to delete")
            return
        for folder in going:
            click.echo(f"{shown_size(folder.size):>9}  {folder.path}")
        if not yes and not click.confirm(f"delete these {len(going)} folders?"):
            click.echo("nothing was deleted")
            return
        for folder in going:
            remove(folder)
    click.echo(f"deleted: {shown_size(sum(folder.size for folder in going))}")


# --- what is printed ------------------------------------------------------------------------------------------------


def summary(record: RunFolder) -> dict[str, Any]:
    """A run's figures for machines."""
    return {
        "run": record.name,
        "folder": str(record.folder),
        "recipe": record.facts.get("recipe"),
        "hw": record.facts.get("hw"),
        "state": record.state,
        "exit_reason": record.facts.get("exit_reason"),
        "step": record.last_step,
        "steps": record.facts.get("steps"),
        "training_loss": record.steps[-1]["loss"] if record.steps else None,
        "evaluation": record.last_score or None,
        "faults": record.faults,
    }


def as_dict(found: Verdict) -> dict[str, Any]:
    return {
        "base": found.base.name,
        "other": found.other.name,
        "unlike": list(found.unlike),
        "measure": found.measure or None,
        "gap": found.gap if found.measure else None,
        "standard_error": found.error if found.measure else None,
        "exceeds_noise": found.exceeds_noise,
        "notes": list(found.notes),
    }


def print_json(value: Any) -> None:
    """JSON for machines, which knows no NaN: null in its place."""
    strict = json.loads(json.dumps(value), parse_constant=lambda _: None)
    click.echo(json.dumps(strict, indent=1, ensure_ascii=False))


def print_table(records: list[RunFolder]) -> None:
    """A line a run; where the terminal is narrower it wraps, and nothing is cut."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from tools.report import facts

    found = Table(box=None, pad_edge=False)
    for column in ("run", "state", "steps", "training loss", "held-out loss", "bits per byte"):
        found.add_column(column, no_wrap=True)
    for record in records:
        evaluation = record.last_score
        cells = [
            record.name,
            record.state,
            f"{record.last_step} of {record.facts.get('steps', '–')}",
            facts.text_of(record.steps[-1]["loss"]) if record.steps else "–",
            facts.with_error(evaluation.get("eval_loss", "–"), evaluation.get("eval_loss_se")),
            facts.with_error(evaluation.get("bits_per_byte", "–"), evaluation.get("bits_per_byte_se")),
        ]
        found.add_row(*map(Text, cells))  # Text: a name is no markup
    Console(highlight=False, width=1000).print(found)


def print_config(rows: list[tuple[str, list[str]]]) -> None:
    click.echo("\nconfig, where it is not the same:" if rows else "\nconfig: the same in all")
    for key, values in rows:
        click.echo(f"  {key}: {' | '.join(values)}")
