"""recipes/<name>/results.yaml: what ran where, each entry with its class of evidence and what that class must name.

A board without an entry is one on which nobody ran the recipe. `make docs` makes the tables of the READMEs from these
files; CONTRIBUTING.md shows how an entry is added.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, TypeAlias

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict, ValidationError, model_validator

from common import hardware
from common.errors import UsageError, VerificationError
from common.files import sha256_file

FILE = "results.yaml"
FOLDER = "results"  # beside it: the files that entries list
CLASSES = ("measured", "published", "double only")  # strongest first
NEVER = "never run"
MOST = 100_000  # values of a file: a few lines of aliases to aliases are gigabytes of them
SERVING = "recipe serve"  # begins the `what` of an entry of a served model, by which no training is measured


def _of_the_table(board: str) -> str:
    if board not in hardware.table():
        raise ValueError(f"{board!r} is no board of hardware.yaml")
    return board


def _below(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or parts[0] == "/" or ".." in parts:
        raise ValueError(f"{path!r} is not a path below the recipe's {FOLDER}/")
    return path


Words = Annotated[str, Field(min_length=1)]
Board = Annotated[str, AfterValidator(_of_the_table)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Positive = Annotated[float, Field(gt=0)]
Step = Annotated[int, Field(gt=0, strict=True)]


class _Part(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Loss(_Part):
    loss: float
    """Nats a token."""
    standard_error: Positive | None = None
    """Over rows; of a gain, paired by row."""


class HeldOut(Loss):
    """The loss on rows that were not trained on."""

    step: Step
    """Updates before the evaluation; steps count from 1."""
    bits_per_byte: Positive | None = None
    """Of recipes whose text is scored whole: comparable between tokenizers."""
    untrained: Loss | None = None
    """The same rows before the first update."""
    gain: Loss | None = None
    """The untrained loss minus this one, paired by row."""


class Corpus(_Part):
    sha256: Sha256
    characters: Annotated[int, Field(gt=0)]


class File(_Part):
    path: Annotated[str, AfterValidator(_below)]
    """Relative to the recipe's results/ folder."""
    sha256: Sha256


class Band(_Part):
    """How far from the entry's figures a run may be where its bits cannot be the same: on another CPU, say."""

    loss: dict[Step, Positive]
    """Nats a token, for steps of loss_at; further away is a fail."""
    held_out: Positive | None = None
    """Nats a token."""
    origin: Words
    """Where these numbers come from."""


class Exact(_Part):
    """The bits of a run on a CPU, and what must be the same for them to be expected again."""

    lock_sha256: Sha256
    cpu_class: Words
    """As common.hardware.cpu_class says it."""
    threads: Step
    """Of each process."""
    world: Step
    """Processes."""
    compiled: bool
    tokens_sha256: Sha256
    """Of the data; not part of the key: other tokens are another training."""
    history_sha256: Sha256
    """Over every step's loss and gradient norm and every evaluation, as tools.runs.folder takes it."""
    weights_sha256: Sha256
    """Of the weights in the last checkpoint."""


class Scaling(_Part):
    """Several devices beside one, from one `recipe verify ddp`."""

    devices: Annotated[int, Field(gt=1, strict=True)]
    one: Positive
    """Tokens/s of one device; tokens_per_second is that of all."""
    ratio: Positive
    efficiency: Positive
    """The ratio divided by the devices."""
    step_seconds: Positive
    compute_seconds: Positive
    """Of a step without the summing of gradients."""
    all_reduce_share: Annotated[float, Field(ge=0, lt=1)]
    """Of a step: what the summing adds to the computing, where it does not hide behind it."""
    one_process_all_threads: Positive | None = None
    """Tokens/s of one process with the threads of all."""


class _Figures(_Part):
    """What both kinds of numbers hold; at least one number."""

    board: Board
    what: Words
    """What was run, in words."""
    machine: Words
    """What it ran on: processor and threads, or chips and host."""
    loss_at: dict[Step, float] = {}
    """Training loss at steps, nats a token."""
    held_out: HeldOut | None = None
    tokens_per_second: Positive | None = None
    """After warm-up, all devices together."""
    scaling: Scaling | None = None
    peak_memory_mib: Positive | None = None
    """Of the host, up to the end of training."""
    band: Band | None = None
    corpus: Corpus | None = None
    """The text that was trained on, where the recipe can take several."""
    files: Annotated[tuple[File, ...], Strict(False)] = ()
    """Curves and tables behind the figures."""

    @model_validator(mode="after")
    def _has_a_figure(self) -> _Figures:
        if not (self.loss_at or self.held_out or self.tokens_per_second):
            raise ValueError("it holds no figure: loss_at, held_out or tokens_per_second")
        if self.band and (strange := sorted(set(self.band.loss) - set(self.loss_at))):
            raise ValueError(f"band.loss has step {strange[0]}, loss_at has not")
        return self


class Measured(_Figures):
    """A run of this repository, on that board."""

    evidence: Literal["measured"]
    overrides: Annotated[tuple[str, ...], Strict(False)]
    """What was given to --set; [] for the recipe as it stands."""
    steps: Step | None = None
    """What was given to --steps."""
    date: datetime.date
    commit: Annotated[str, Field(pattern="^[0-9a-f]{7,40}$")]
    """Of this repository, as the run's manifest has it."""
    image: Words | None = None
    """Digest of the image that it ran in; none for the machine's own Python."""
    exact: Exact | None = None
    """CPU runs: the same again means the same bits."""


class Published(_Figures):
    """Somebody else's run, of their own program: never a run of this repository."""

    evidence: Literal["published"]
    source: Words
    """Where it can be read."""
    stack: Words
    """The program and its version."""


class DoubleOnly(_Part):
    """The test suite runs the recipe's path for that board, against stand-ins for ttml and ttnn on a CPU."""

    board: Board
    evidence: Literal["double only"]
    test: Words
    """The test file, from the repository's root."""


Numbers: TypeAlias = Measured | Published
Entry: TypeAlias = Measured | Published | DoubleOnly


def is_serving(entry: Entry) -> bool:
    """Return whether an entry is of a model that was served on the board, and of no training."""
    return isinstance(entry, Measured) and entry.what.startswith(SERVING)


class Results(_Part):
    format: Literal[1]
    recipe: str
    """The folder's name. A copied folder keeps the other name, so nobody's results become a fork's."""
    entries: Annotated[tuple[Annotated[Entry, Field(discriminator="evidence")], ...], Strict(False)]

    def evidence(self, board: str) -> str:
        """Return the strongest class of evidence that the recipe trains on a board, or `never run`."""
        found = {entry.evidence for entry in self.entries if entry.board == board and not is_serving(entry)}
        return next((name for name in CLASSES if name in found), NEVER)

    @property
    def numbers(self) -> tuple[Numbers, ...]:
        """Return the entries that hold figures, in the file's order."""
        return tuple(entry for entry in self.entries if not isinstance(entry, DoubleOnly))


def load(folder: Path) -> Results:
    """Return the results of the recipe in `folder`, with every listed file's hash checked.

    Raises UsageError where results.yaml is missing or says what it may not, VerificationError for a wrong hash.
    """
    path = folder / FILE
    try:
        tree = read_yaml(path)
    except FileNotFoundError:
        raise UsageError(
            f"the recipe has no {FILE}",
            where=str(folder),
            todo=f"where nothing was run yet, write: format: 1, recipe: {folder.name}, entries: []",
        ) from None
    # Beside YAML's own errors those of its types: a date that there is not, a tag that does not fit, no UTF-8.
    except (OSError, yaml.YAMLError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise UsageError(f"not valid YAML: {' '.join(str(error).split())}", where=str(path)) from None
    try:
        results = Results.model_validate(tree)
    except ValidationError as error:
        mistakes = "\n".join(f"  {line}" for line in _mistakes(error))
        raise UsageError(f"{FILE} is not as it must be:\n{mistakes}", where=str(path)) from None
    if results.recipe != folder.name:
        raise UsageError(
            f"these are the results of the recipe {results.recipe}, not of {folder.name}",
            where=f"{path}: recipe",
            todo=f"in a copied recipe: recipe: {folder.name}, entries: []",
        )
    for entry in results.numbers:
        _check(entry.files, folder / FOLDER)
    return results


def read_yaml(path: Path) -> Any:
    """Return what a YAML file holds. Raises ValueError where aliases make more of it than MOST values."""
    text = path.read_text(encoding="utf-8")
    if (root := yaml.compose(text, Loader=yaml.SafeLoader)) is not None and values_of(root, {}) > MOST:
        raise ValueError(f"its aliases (*name) make more than {MOST} values of it")
    return yaml.safe_load(text)


def values_of(node: yaml.Node, known: dict[int, int]) -> int:
    """Return how many values a node holds, those behind an alias each time; `known` has them by the nodes' ids.

    Raises RecursionError for a node that holds itself.
    """
    if id(node) not in known:
        parts = node.value if isinstance(node, yaml.CollectionNode) else ()
        inner = (one for part in parts for one in (part if isinstance(part, tuple) else (part,)))
        known[id(node)] = 1 + sum(values_of(one, known) for one in inner)
    return known[id(node)]


def _mistakes(error: ValidationError) -> Iterable[str]:
    for item in error.errors(include_url=False):
        message = {"missing": "is required", "extra_forbidden": "unknown key"}.get(item["type"], item["msg"])
        place = ".".join(str(part) for part in item["loc"])
        yield f"{place}: {message.removeprefix('Value error, ')}"


def _check(files: Iterable[File], folder: Path) -> None:
    for file in files:
        path = folder / file.path
        found = sha256_file(path) if path.is_file() else None
        if found != file.sha256:
            raise VerificationError(
                f"{path} is not the file its entry lists" if found else f"{path} is listed and not there",
                where=f"{folder.with_name(FILE)}: files, {file.path}: sha256 {file.sha256}, found {found}",
                todo="put the listed file back, or correct the entry if the file is the right one",
            )
