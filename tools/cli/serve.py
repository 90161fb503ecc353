"""`recipe serve`: a trained model behind OpenAI's API, and the test of whatever serves one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from common.errors import UsageError
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
@click.option("--places", type=click.IntRange(1, 64), default=4, show_default=True, help="Answers at once, per model.")
@click.option(
    "--queue", type=click.IntRange(min=0), default=4, show_default=True, help="Requests that may wait, per model."
)
@click.option(
    "--context", type=click.IntRange(min=2), help="Tokens of prompt and answer together; without: the model's."
)
@click.option("--cors", metavar="ORIGIN", help="Let pages of this origin read the answers.")
@click.option(
    "--check", metavar="URL", help="Serve nothing: test what serves at URL, such as http://127.0.0.1:8000/v1."
)
@click.option("--against", type=RUN, help="With --check: compare greedy answers with those of this run or folder.")
def serve(run: Path | None, check: str | None, against: Path | None, key_file: Path | None, **options: Any) -> int:
    """Serve RUN's verified export, or any Hugging Face Llama folder, behind OpenAI's API; on this machine's CPU."""
    if check is not None:
        if run is not None:
            raise UsageError("--check serves nothing", todo="leave out RUN; --against RUN compares with its answers")
        from tools.serve.check import check as check_url

        return check_url(check, options["label"], key_file, against, click.echo)
    if run is None or against is not None:
        raise UsageError("what is to be served?", todo="recipe serve RUN, or recipe serve --check URL [--against RUN]")
    from tools.serve.start import Options
    from tools.serve.start import serve as start

    start(run, Options(key_file=key_file, **options), say)
    return 0
