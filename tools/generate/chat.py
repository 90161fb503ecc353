"""Talk to a trained run, or to any Llama in a Hugging Face folder: one answer, or a loop of prompts on a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from common import hardware
from common.config import Config
from common.config.schema import Evaluation
from common.data.chat import ChatTokenizer
from common.engine import Backend
from common.errors import DataError, MachineError, RecipeError, UsageError
from common.files import read_json
from common.model import llama
from common.model.weights import Weights
from common.train.generate import generate
from engines.registry import engine_for
from tools.runs import trained
from tools.runs.folder import is_run

Say = Callable[[str], None]
ANSWER_TOKENS = 256  # longest answer of a plain folder, unless the caller says otherwise


@dataclass(frozen=True)
class Speaker:
    """A model that answers. `mode` is entered for each answer: adapters on, or off."""

    name: str
    backend: Backend
    tokenizer: ChatTokenizer
    config: Config
    context: int
    mode: Callable[[], AbstractContextManager[None]] = field(default=nullcontext)

    def answer(self, prompt: str, on_token: Callable[[int, int], None] | None = None) -> tuple[str, bool]:
        """Return the answer to one prompt, which stands alone, and whether it was cut off at max_new_tokens."""
        ids = self.tokenizer.prompt_ids(prompt, self.config.data.system_prompt)
        sampling = within(self.config, self.context - len(ids))
        with self.mode():
            (answer,) = generate(
                self.backend,
                [ids],
                sampling,
                eos_ids=self.tokenizer.eos_ids,
                vocab_size=self.tokenizer.vocab_size,
                never_ids=self.tokenizer.never_ids,
                seed=self.config.training.seed,
                on_token=on_token,
            )
        return self.tokenizer.decode(answer, skip_special=True).strip(), len(answer) == sampling.max_new_tokens


def talk(
    target: Path,
    prompts: Sequence[str] = (),
    *,
    base: bool = False,
    sampling: Mapping[str, Any] | None = None,
    seed: int | None = None,
    out: TextIO | None = None,
    say: Say | None = None,
) -> None:
    """Answer `prompts`; without any, those typed on a terminal, else all of standard input as one.

    `target` is a run's folder (its newest verified checkpoint, or one checkpoint's folder), or a Hugging Face folder
    with a Llama. `base` shows the untuned answer, too. `sampling` replaces keys of eval_config where not None.
    Answers go to `out` as they come (standard output), what is said about them to `say` (standard error).
    """
    out = out or sys.stdout
    say = say or (lambda line: print(line, file=sys.stderr, flush=True))
    alone = not prompts and sys.stdin.isatty()
    asked = list(prompts) if prompts or alone else [piped_prompt()]
    changes: dict[str, Any] = {f"eval.{key}": value for key, value in (sampling or {}).items() if value is not None}
    if seed is not None:
        changes["training.seed"] = seed
    with ExitStack() as stack:
        speakers = stack.enter_context(open_speakers(target, base, changes, say))
        for prompt in asked:
            answer_all(speakers, prompt, out, say)
        if alone:
            say(f"{speakers[0].name}. Each prompt stands alone; Ctrl-C ends an answer, Ctrl-D the talk.")
            prompt_loop(speakers, out, say)


def piped_prompt() -> str:
    text = sys.stdin.read().strip()
    if not text:
        raise UsageError("no prompt", todo='give one with --prompt "...", or type them on a terminal')
    return text


def prompt_loop(speakers: Sequence[Speaker], out: TextIO, say: Say) -> None:
    """Ask for prompts until the terminal's end of file."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  arrow keys and history at input()
    while True:
        try:
            prompt = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print(file=out)
            return
        if not prompt:
            continue
        try:
            answer_all(speakers, prompt, out, say)
        except KeyboardInterrupt:
            print(file=out)
        except RecipeError as error:  # a prompt that cannot be asked ends nothing
            say(str(error))


def answer_all(speakers: Sequence[Speaker], prompt: str, out: TextIO, say: Say) -> None:
    """Print each speaker's answer as its tokens come; their names only where there are several."""
    for speaker in speakers:
        if len(speakers) > 1:
            print(f"--- {speaker.name}", file=out, flush=True)
        stream = Stream(speaker.tokenizer, out)
        text, cut = speaker.answer(prompt, stream)
        stream.finish(text)
        if cut:
            say("(cut off: --max-new-tokens makes room for a longer answer)")


class Stream:
    """Prints an answer while it grows: whole characters only, without the white space around it."""

    def __init__(self, tokenizer: ChatTokenizer, out: TextIO) -> None:
        self.tokenizer, self.out = tokenizer, out
        self.ids: list[int] = []
        self.printed = ""

    def __call__(self, _row: int, token: int) -> None:
        self.ids.append(token)
        # All ids anew at every token: a decoder may put or drop white space between two, which a piece alone hides.
        text = self.tokenizer.decode(self.ids, skip_special=True).strip()
        if not text.endswith("\ufffd"):  # else: a character of several tokens, not all of them there yet
            self._print(text)

    def _print(self, text: str) -> None:
        if text.startswith(self.printed):
            self.out.write(text[len(self.printed) :])
            self.out.flush()
            self.printed = text

    def finish(self, text: str) -> None:
        """Print the rest of the whole answer, and the end of its line."""
        self._print(text)
        self.out.write("\n")
        self.out.flush()


def within(config: Config, room: int) -> Evaluation:
    """Return the config's sampling, with answers no longer than the model has positions left."""
    if room < 1:
        raise DataError(f"the prompt is {1 - room} tokens too long for this model to answer", todo="shorten the prompt")
    limit = min(config.eval.max_new_tokens, room)
    return config.with_values(**{"eval.max_new_tokens": limit}).eval


# --- opening --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_speakers(target: Path, base: bool, changes: Mapping[str, Any], say: Say) -> Iterator[list[Speaker]]:
    """Yield the model at `target`, and the untuned one after it when `base` asks for it."""
    if is_run(target) or (target / "state.json").is_file():
        with run_speakers(target, base, changes, say) as speakers:
            yield speakers
    elif base:
        raise UsageError(
            "a Hugging Face folder has no untuned answer beside it", where=str(target), todo="give the run's folder"
        )
    else:
        with folder_speaker(target, changes) as speaker:
            yield [speaker]


@contextlib.contextmanager
def run_speakers(target: Path, base: bool, changes: Mapping[str, Any], say: Say) -> Iterator[list[Speaker]]:
    run = trained.read(target, say)
    config = run.config.with_values(**changes)
    context = run.base.architecture["max_position_embeddings"]
    name = f"{run.folder.name}, step {run.step}"
    with ExitStack() as stack:
        backend = stack.enter_context(trained.engine(run))
        speakers = [Speaker(name, backend, run.tokenizer, config, context)]
        if base and config.model.lora:
            untuned = Speaker(run.base.name, backend, run.tokenizer, config, context, backend.disable_adapter)
            speakers.append(untuned)
        elif base:
            other = stack.enter_context(trained.engine(run, trained=False))
            speakers.append(Speaker(run.base.name, other, run.tokenizer, config, context))
        yield speakers


@contextlib.contextmanager
def folder_speaker(
    folder: Path, changes: Mapping[str, Any], weights: Mapping[str, Any] | None = None
) -> Iterator[Speaker]:
    """Yield the Llama in a Hugging Face folder, in fp32 and greedy unless told otherwise.

    `weights` are its tensors by name (arrays of the shapes that its config.json asks for); those of its files if None.
    """
    architecture = architecture_of(folder)
    config = folder_config(folder).with_values(**changes)
    cpu = hardware.get("cpu")
    with engine_for(cpu).open_backend(cpu, config) as backend:
        backend.build(architecture)
        backend.load(weights or Weights(sorted(folder.glob("*.safetensors"))))
        context = architecture["max_position_embeddings"]
        yield Speaker(folder.name, backend, ChatTokenizer.load(folder), config, context)


def architecture_of(folder: Path) -> dict[str, Any]:
    """Return the folder's config.json. Raises UsageError when it holds no Llama."""
    if (folder / "adapter_config.json").is_file():
        raise UsageError("that is an adapter", where=str(folder), todo="give its run, or export/merged beside it")
    try:
        architecture = read_json(folder / "config.json")
    except MachineError as error:
        raise UsageError(
            "no run and no Hugging Face folder there",
            where=str(folder),
            todo="give a folder of runs/, or export/merged",
        ) from error
    if architecture.get("model_type") != "llama":
        raise UsageError(f"a {architecture.get('model_type')} model; this talks to Llamas", where=str(folder))
    if lacking := llama.lacks(architecture):
        raise UsageError(f"its config.json has no number for {', '.join(lacking)}", where=str(folder))
    return architecture


def folder_config(folder: Path) -> Config:
    """Return a config for a model that is only talked to; of training it holds what the schema requires."""
    return Config.model_validate(
        {
            "recipe": folder.name,
            "hw": "cpu",
            "training_config": {"batch_size": 1, "learning_rate": 1.0, "max_steps": 1, "precision": "fp32"},
            "model_config": {"base": str(folder)},
            "data_config": {"source": "none"},
            "eval_config": {"every": 0, "prompts": [], "max_new_tokens": ANSWER_TOKENS},
            "checkpoint_config": {"every": 0},
            "device_config": {"compile": "never"},
        }
    )
