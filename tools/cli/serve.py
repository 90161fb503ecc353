"""`recipe serve`: a trained model behind OpenAI's API, and the test of whatever serves one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from common.errors import UsageError
from common.hardware import get
from tools.cli.options import RUN


def say(line: str) -> None:
    click.echo(line, err=True)


@click.command()
@click.argument("run", type=RUN, required=False)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Where to listen; another than this machine's own needs a key.",
)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any that is free.")
@click.option("--name", "label", help="The model's name in requests; without: the folder's.")
@click.option("--base", is_flag=True, help="Serve the untuned model too, under its own name.")
@click.option(
    "--api-key-file", "key_file", type=click.Path(path_type=Path), help="A file with the key that is asked for."
)
@click.option(
    "--max-tokens", type=click.IntRange(min=1), help="Of an answer whose request names no limit; without: the recipe's."
)
@click.option(
    "--slots",
    type=click.IntRange(1, 64),
    default=4,
    show_default=True,
    help="Answers at once, per model; on a board 32.",
)
@click.option(
    "--queue", type=click.IntRange(min=0), default=4, show_default=True, help="Requests that may wait, per model."
)
@click.option(
    "--context", type=click.IntRange(min=2), help="Tokens of prompt and answer together; without: the model's."
)
@click.option("--cors", metavar="ORIGIN", help="Let pages of this origin read the answers.")
@click.option(
    "--hw", metavar="BOARD", help="Print what would serve it on a board, such as n150; cpu: here, as without."
)
@click.option("--road", type=click.Choice(["tt-inference-server", "vllm"]), help="With --hw: by what; without: both.")
@click.option("--mesh", metavar="NAME", help="With --hw: some of the board's chips, by a name such as N150.")
@click.option(
    "--server-dir",
    type=click.Path(path_type=Path, exists=True, file_okay=False, resolve_path=True),
    help="With --hw: a checkout of tt-inference-server.",
)
@click.option("--yes", is_flag=True, help="With --hw and --road: start it, where the board is.")
@click.option(
    "--check", metavar="URL", help="Serve nothing: test what serves at URL, such as http://127.0.0.1:8000/v1."
)
@click.option("--against", type=RUN, help="With --check: compare greedy answers with those of this run or folder.")
def serve(
    run: Path | None,
    check: str | None,
    against: Path | None,
    hw: str | None,
    key_file: Path | None,
    **options: Any,
) -> int:
    """Serve RUN's verified export, or any Hugging Face Llama folder, behind OpenAI's API; on this machine's CPU.

    With --hw BOARD: print what would serve a run's export on a board, and start that with --yes.
    """
    typed = click.get_current_context()
    given = {name for name in typed.params if typed.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    of_board = {name: options.pop(name) for name in ("road", "mesh", "server_dir", "yes")}
    if check is not None:
        if run is not None or hw is not None:
            todo = "leave out RUN and --hw; --against RUN compares with its answers"
            raise UsageError("--check serves nothing", todo=todo)
        from tools.serve.check import check as check_url

        return check_url(check, options["label"], key_file, against, click.echo)
    if run is None or against is not None:
        raise UsageError("what is to be served?", todo="recipe serve RUN, or recipe serve --check URL [--against RUN]")
    if hw is not None and hw != "cpu":
        return on_board(hw, run, given, {**options, **of_board})
    if strange := sorted(given & set(of_board)):
        raise UsageError("only a board is served so", where=flags(strange), todo="name it: --hw n150")
    from tools.serve.start import Options
    from tools.serve.start import serve as start

    start(run, Options(key_file=key_file, **options), say)
    return 0


def on_board(hw: str, run: Path, given: set[str], options: dict[str, Any]) -> int:
    """Serve a run on a board. Raises UsageError for options that only our own server has."""
    from tools.serve.board.start import Options, serve_on

    taken = {field.name: options[field.name] for field in dataclasses.fields(Options) if field.name in given}
    if strange := sorted(given - set(taken) - {"run", "hw"}):
        todo = "leave it out: the board's server is vLLM, whose model is named as its folder"
        raise UsageError(f"our own server has that, on a CPU; {hw} has not", where=flags(strange), todo=todo)
    return serve_on(get(hw), run, Options(**taken), click.echo, say)


def flags(names: list[str]) -> str:
    """Return parameters as they are typed."""
    typed = {"label": "name", "key_file": "api-key-file"}
    return ", ".join(f"--{typed.get(name, name).replace('_', '-')}" for name in names)
