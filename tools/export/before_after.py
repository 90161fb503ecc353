"""before_after.md: what the base and the trained model answer to the evaluation prompts, and whether that was learned
or learned by heart.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.config.layers import shown
from common.data.chat import ChatTokenizer
from common.errors import DataError
from common.files import write_atomic
from common.train.evaluate import from_rows
from tools.export.model_card import quoted
from tools.runs.trained import TrainedRun

VERBATIM = 8  # words in a row out of one training response: more than chance gives, so it was learned by heart
PHRASE = 5  # words of the phrases that are looked up in the training responses
REPEAT = 4  # words of the phrases that are counted as repeated within an answer
WORD = re.compile(r"\w+(?:['’]\w+)*")


def write_card(run: TrainedRun, say: Callable[[str], None]) -> Path | None:
    """Write before_after.md, say its one line and return it.

    Returns None, and says so, for a run that has no evaluation of the untrained model on these rows.
    """
    records = run.evaluations
    if len(records) < 2 or records[0]["step"] != 0:
        say("no before_after.md: this run has no evaluation of the untrained model")
        return None
    try:
        text: TrainingText | None = TrainingText(responses(run))
    except DataError as error:
        text = None
        say(f"no check for memorized answers: {error.what}")
    answers = examine(records[0], records[-1], text, run)
    head = headline(records[0], records[-1], answers)
    path = run.folder / "before_after.md"
    write_atomic(path, markdown(head, records[-1]["step"], answers, text))
    say(f"before_after.md: {head}")
    return path


# --- what an answer is checked for ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Copied:
    """The longest run of words that an answer shares with one training response, and where that stands."""

    words: int
    text: str
    where: str


@dataclass(frozen=True)
class Examined:
    """One prompt with both answers, and what was found in the trained model's."""

    prompt: str
    before: str
    after: str
    copied: Copied
    copied_before: Copied
    known_phrases: float
    repeated: float
    marker: str | None
    truncated: bool

    @property
    def verbatim(self) -> bool:
        return self.copied.words >= VERBATIM


class TrainingText:
    """The responses a run was trained on, indexed by word. `responses` are (place, text)."""

    def __init__(self, responses: Iterable[tuple[str, str]]) -> None:
        self.places: list[str] = []
        self.at: dict[str, list[tuple[int, int]]] = {}
        self.phrases: set[tuple[str, ...]] = set()
        for number, (place, text) in enumerate(responses):
            words = words_of(text)
            self.places.append(place)
            self.phrases.update(phrases(words, PHRASE))
            for position, word in enumerate(words):
                self.at.setdefault(word, []).append((number, position))

    def longest_copy(self, text: str) -> Copied:
        """Return the longest run of words of `text` that stands in one response; case and punctuation do not count."""
        # The longest common run of words, by the classic table (a cell is the run that ends there), of which only the
        # cells of words that occur are kept: before[row, position] of the word before.
        words = words_of(text)
        best, row, end = 0, 0, 0
        before: dict[tuple[int, int], int] = {}
        for index, word in enumerate(words):
            lengths = {}
            for number, position in self.at.get(word, []):
                length = lengths[number, position] = before.get((number, position - 1), 0) + 1
                if length > best:
                    best, row, end = length, number, index + 1
            before = lengths
        return Copied(best, " ".join(words[end - best : end]), self.places[row] if best else "")

    def known_share(self, text: str) -> float:
        """Return the share of the text's five-word phrases that stand in some response; 0 for a shorter text."""
        found = [phrase in self.phrases for phrase in phrases(words_of(text), PHRASE)]
        return sum(found) / len(found) if found else 0.0


def responses(run: TrainedRun) -> Iterator[tuple[str, str]]:
    """Yield (file:line, text) of every response as it was trained on: from the tokens, with every cut and control."""
    dataset = run.dataset()
    for index, where in enumerate(dataset.places("train")):
        row = dataset.train.row(index)
        edges = np.flatnonzero(np.diff(row.mask, prepend=0, append=0))  # where the mask turns on, off, on, ...
        turns = [row.ids[start:end].tolist() for start, end in edges.reshape(-1, 2)]
        yield shown(Path(where)), " ".join(run.tokenizer.decode(turn, skip_special=True) for turn in turns)


def examine(first: dict[str, Any], last: dict[str, Any], text: TrainingText | None, run: TrainedRun) -> list[Examined]:
    """Return the answers after step 0 and after the last one, checked, to the prompts that both were asked."""
    text = text or TrainingText([])
    asked_before = {sample["prompt"]: sample for sample in first["samples"]}
    pairs = [(asked_before[s["prompt"]], s) for s in last["samples"] if s["prompt"] in asked_before]
    limit = run.config.eval.max_new_tokens
    return [
        Examined(
            prompt=after["prompt"],
            before=before["answer"],
            after=after["answer"],
            copied=text.longest_copy(after["answer"]),
            copied_before=text.longest_copy(before["answer"]),
            known_phrases=text.known_share(after["answer"]),
            repeated=repeated_share(after["answer"]),
            marker=run.tokenizer.marker_in(after["answer"]),
            truncated=tokens_of(after, run.tokenizer) >= limit,
        )
        for before, after in pairs
    ]


def tokens_of(sample: dict[str, Any], tokenizer: ChatTokenizer) -> int:
    """Return how long the answer was: as recorded, else as its text is tokenized."""
    return int(sample.get("tokens") or len(tokenizer.encode_text(sample["answer"])))


def repeated_share(text: str) -> float:
    """Return the share of the text's four-word phrases that said again what an earlier one said."""
    found = Counter(phrases(words_of(text), REPEAT))
    return 1 - len(found) / found.total() if found else 0.0


def words_of(text: str) -> list[str]:
    return WORD.findall(text.casefold())


def phrases(words: Sequence[str], length: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + length]) for start in range(len(words) - length + 1)]


# --- what is written ------------------------------------------------------------------------------------------------


def headline(first: dict[str, Any], last: dict[str, Any], answers: Sequence[Examined]) -> str:
    """Return the losses, the gain and the counts of what was found, in one line."""
    before, after = from_rows(first["nll"], first["tokens"]), from_rows(last["nll"], last["tokens"])
    gain, error = after.improvement_over(before)
    counts = {
        "verbatim": sum(answer.verbatim for answer in answers),
        "with template markers": sum(answer.marker is not None for answer in answers),
        "cut off": sum(answer.truncated for answer in answers),
    }
    found = ", ".join(f"{count} {name}" for name, count in counts.items())
    longest = max((answer.copied.words for answer in answers), default=0)
    return (
        f"held-out loss {before.loss:.4f} -> {after.loss:.4f} (paired gain {gain:.4f} ± {error:.4f}); "
        f"of {len(answers)} answers {found}; longest run of training words {longest}"
    )


def markdown(head: str, step: int, answers: Sequence[Examined], text: TrainingText | None) -> str:
    lines = [f"# Before and after: the base, and step {step}", "", f"{head[0].upper()}{head[1:]}.", ""]
    if text is None:
        lines += ["The training rows are not here: nothing below was checked for memorized words.", ""]
    legend = (
        f"An answer is verbatim when {VERBATIM} or more of its words in a row stand in one training response. *Known "
        f"phrases*: the share of its {PHRASE}-word phrases that stand in some training response. *Repeated*: the share "
        f"of its {REPEAT}-word phrases that it had said before. In brackets: the base's answer, which saw no training "
        "row; what it shares is chance."
    )
    columns = "| | prompt | longest run of training words | known phrases | repeated | markers | cut off |"
    lines += [legend, "", columns, "|---|---|---|---|---|---|---|"]
    lines += [table_row(number, answer) for number, answer in enumerate(answers, 1)]
    for number, answer in enumerate(answers, 1):
        lines += ["", f"## {number}. {answer.prompt}", "", "**base**", "", quoted(answer.before), ""]
        lines += ["**trained**", "", quoted(answer.after)]
        if answer.verbatim:
            lines += ["", f'Verbatim: "{answer.copied.text}", out of {answer.copied.where}']
    return "\n".join(lines) + "\n"


def table_row(number: int, answer: Examined) -> str:
    prompt = answer.prompt.replace("|", "\\|").replace("\n", " ")
    copied = f"{answer.copied.words} ({answer.copied_before.words})"
    cells = [
        str(number),
        prompt,
        f"**{copied}, verbatim**" if answer.verbatim else copied,
        percent(answer.known_phrases),
        percent(answer.repeated),
        f"`{answer.marker}`" if answer.marker else "none",
        "yes" if answer.truncated else "no",
    ]
    return f"| {' | '.join(cells)} |"


def percent(share: float) -> str:
    return f"{math.floor(share * 100 + 0.5)} %"  # round() would make 12.5 a 12: it rounds a half to the even number
