"""make docs RUN=runs/...: what README.md shows of a run, its picture (docs/run.svg), figures and three answers."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path

from common.errors import UsageError
from common.files import write_atomic
from common.train.console import clock
from tools.report import pages
from tools.results.record import asked_steps, machine_of
from tools.runs.folder import Record, RunFolder, read_run

BEGIN = "<!-- made by `make docs RUN=runs/...`: do not edit -->"
END = "<!-- end of what the run says -->"
PAGE, PICTURE = "README.md", "docs/run.svg"
ANSWER = 88  # characters of an answer at most: a line of the page on a desk, three on a phone
MARKS = re.compile(r"([\\`*_{}\[\]<>#|~$&])")  # what Markdown, or GitHub's mathematics, takes for more than itself


def show(folder: Path, root: Path) -> list[Path]:
    """Put the run in `folder` into the README of the repository `root`; return what was written, picture and page.

    Raises UsageError for a run that is not done, not of a commit or not of the recipe's own config, or that has no
    answers before and after.
    """
    run = read_run(folder, strict=True)
    changed = run.manifest.overrides or asked_steps(run.manifest.command)
    if run.state != "done" or run.manifest.git_dirty is not False or changed:
        what = "the README shows a run that is done, from a clean tree, of a recipe as it stands (no SET, no STEPS)"
        raise UsageError(what, where=str(folder), todo="commit, run the recipe, and give that run")
    page, picture = root / PAGE, root / PICTURE
    text, drawn = block(run), pages.picture(run)
    put(page, BEGIN, END, text)
    write_atomic(picture, drawn)
    return [picture, page]


def put(page: Path, begin: str, end: str, body: str) -> None:
    """Write `body` between the two markers of a page. Raises UsageError where it has them not."""
    before, opened, rest = page.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not opened or not closed:
        raise UsageError("the page needs both markers", where=str(page), todo=f"{begin} ... {end}")
    write_atomic(page, f"{before}{begin}\n\n{body}\n\n{end}{after}")


def block(run: RunFolder) -> str:
    """Return the picture, what the run took and gained, and its answers to the first, middle and last prompt."""
    manifest, first, last = run.manifest, run.held_out(0), run.held_out()
    prompts = run.evaluations[-1]["samples"] if run.evaluations else []
    if first is None or last is None or len(run.evaluations) < 2 or len(prompts) < 3:
        what = "the README shows three answers before and after training; this run has fewer"
        raise UsageError(what, where=str(run.folder), todo="give a run that is evaluated at step 0, with three prompts")
    gain, error = last.improvement_over(first)
    took = clock((_time(manifest.end or manifest.start) - _time(manifest.start)).total_seconds())
    memory = f", {manifest.peak_memory_mib / 1024:.1f} GiB of memory" if manifest.peak_memory_mib else ""
    figures = [
        f"**What came out** of `{manifest.recipe}` at commit {str(manifest.git_commit)[:7]}, {manifest.start[:10]},",
        f"on {machine_of(run.backend)}:",
        f"{run.last_step} steps, {took} from start to checked export{memory}.",
        f"Held-out loss {first.loss:.4f} → {last.loss:.4f} nats a token,",
        f"better by {gain:.4f} ± {error:.4f}, paired by row.",
        f"Of its {len(prompts)} prompts, none of them trained on, the first, the middle and the last:",
    ]
    picture = f"![The page of this run: held-out loss {first.loss:.4f} before, {last.loss:.4f} after]({PICTURE})"
    asked = [prompts[at]["prompt"] for at in (0, len(prompts) // 2, -1)]
    return "\n\n".join([picture, "\n".join(figures), *(_answers(run, prompt) for prompt in asked)])


def _answers(run: RunFolder, prompt: str) -> str:
    """A prompt with its answers before and after training, a line each."""
    before, after = (_escaped(_short(_answer(run.evaluations[at], prompt))) for at in (0, -1))
    return f"**{_escaped(prompt)}**<br>\n*before:* {before}<br>\n*after:* {after}"


def _time(stamp: str) -> datetime:
    return datetime.fromisoformat(stamp.replace("Z", "+00:00"))  # Python 3.10 reads no Z


def _answer(evaluation: Record, prompt: str) -> str:
    """The answer to a prompt in a record of evaluations.jsonl; empty where it was not asked."""
    return next((str(sample["answer"]) for sample in evaluation["samples"] if sample["prompt"] == prompt), "")


def _short(text: str) -> str:
    """The text on one line, cut off behind a word of its first ANSWER characters."""
    line = " ".join(text.split())
    return line if len(line) <= ANSWER else f"{line[: ANSWER + 1].rpartition(' ')[0] or line[:ANSWER]} …"


def _escaped(text: str) -> str:
    """The text as Markdown that shows it as it stands: what a model writes is no markup and no column of the page."""
    return MARKS.sub(r"\\\1", text)
