"""What a run's page says, in words and numbers: outcome, cause, figures, samples, data and config."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from common import config as configs
from common import hardware
from common.data.order import steps_for
from common.errors import RecipeError
from common.train.console import clock
from tools.report.curves import Curve, curve, rate, running_mean
from tools.report.plots import Panel, PlotLine
from tools.runs.folder import Record, RunFolder, few

BAND = 2  # standard errors to each side of a held-out loss: 19 times of 20 the loss over all such rows lies within
SAMPLES = 10  # evaluations whose answers are shown
PROMPTS = 24
ANSWER = 2000  # characters of an answer
LOG_LINES = 15
ROWS = 24  # of a table of numbers
OF_STEPS = ("step", "loss", "lr", "grad_norm", "tokens", "seconds")
OF_SCORES = ("step", "eval_loss", "eval_loss_se", "eval_tokens", "bits_per_byte", "bits_per_byte_se")

OUTCOMES = {
    "done": "It ended as it should.",
    "running": "It is still going: this page shows what is there so far.",
    "stopped": "It was stopped on request. The same command goes on from the last checkpoint.",
    "failed": "It failed.",
    "killed": (
        "Its process ended without a word: it was killed, or the machine went down. "
        "The same command goes on from the last checkpoint."
    ),
}


def cause(run: RunFolder) -> str:
    """Return why a run is not done: the whole message where the run recorded one."""
    reason = str(run.facts.get("exit_reason", "no reason recorded"))
    return str(run.facts.get("error") or reason.partition(": ")[2] or reason)


def last_lines(run: RunFolder) -> list[str]:
    """Return the end of train.log."""
    try:
        text = (run.folder / "train.log").read_bytes().decode("utf-8", errors="replace")
    except OSError:
        return []
    return text.splitlines()[-LOG_LINES:]


# --- figures --------------------------------------------------------------------------------------------------------


def with_error(value: Any, error: Any) -> str:
    """Return a figure with its standard error: `3.4110 ± 0.0198`."""
    if not isinstance(value, int | float):
        return str(value)
    plus_minus = f" ± {error:.4f}" if isinstance(error, int | float) and math.isfinite(error) else ""
    return f"{value:.4f}{plus_minus}"


def tiles(run: RunFolder) -> list[tuple[str, str, str]]:
    """Return the figures at the head of the page: (name, value, what it is)."""
    found = [("steps", f"{run.last_step:,}", f"of {run.facts.get('steps', 'unknown')}")]
    evaluation = run.last_score
    if evaluation:
        loss = with_error(evaluation["eval_loss"], evaluation.get("eval_loss_se"))
        found.append(("held-out loss", loss, f"nats per token after step {evaluation['step']}"))
    if gain := gain_over_untrained(run):
        found.append(("better than untrained", with_error(*gain), "nats per token, paired by row"))
    if "bits_per_byte" in evaluation:
        bits = with_error(evaluation["bits_per_byte"], evaluation.get("bits_per_byte_se"))
        found.append(("bits per byte", bits, "of held-out text, whatever the tokenizer"))
    if run.steps:
        found.append(("training loss", with_error(run.steps[-1]["loss"], None), "nats per token, last step"))
    if (speed := median(rate(run.steps))) is not None:
        found.append(("tokens/s", f"{speed:,.0f}", "median of all steps"))
    seconds = curve(run.steps, "seconds").known.values.sum()
    return [*found, ("training time", clock(float(seconds)), "all steps, without evaluations")]


def gain_over_untrained(run: RunFolder) -> tuple[float, float] | None:
    """Return how much lower the last held-out loss is than the untrained model's, and its error, paired by row."""
    before, after = run.held_out(0), run.held_out()
    if before is None or after is None or run.evaluations[-1]["step"] == 0:
        return None
    try:
        return after.improvement_over(before)
    except ValueError:  # resumed on other rows
        return None


def median(points: Curve) -> float | None:
    values = points.known.values
    return float(np.median(values)) if len(values) else None


def panels(run: RunFolder) -> list[Panel]:
    """Return the plots of a run, the loss first."""
    loss, seconds, speed = curve(run.steps, "loss"), curve(run.steps, "seconds"), rate(run.steps)
    # A twentieth of the run: the same look whatever its length. Below 40 steps it is one step, the curve itself.
    window = max(1, len(loss) // 20)
    held_out = with_band(run.scores, "eval_loss")
    training = [PlotLine(loss, 0 if window == 1 else None, "training loss, each step")]
    if window > 1:
        training.append(PlotLine(running_mean(loss, window), 0, f"mean of the last {window} steps"))
    found = [
        Panel("Loss", [*training, held_out], "nats per token", not_drawn({"loss": loss, "eval_loss": held_out.curve}))
    ]
    if any("bits_per_byte" in evaluation for evaluation in run.scores):
        bits = with_band(run.scores, "bits_per_byte")
        found.append(Panel("Bits per byte", [bits], "of held-out text", not_drawn({"bits_per_byte": bits.curve})))
    plain = {
        "lr": ("Learning rate", "", curve(run.steps, "lr")),
        "grad_norm": ("Gradient norm", "before clipping", curve(run.steps, "grad_norm")),
        "tokens/s": ("Speed", "tokens per second", speed),
        "seconds": ("Time per step", "seconds", seconds),
    }
    for key, (title, unit, points) in plain.items():
        found.append(Panel(title, [PlotLine(points, 0)], unit, not_drawn({key: points})))
    return found


def with_band(evaluations: Sequence[Record], key: str) -> PlotLine:
    points, error = curve(evaluations, key), curve(evaluations, f"{key}_se")
    whole = np.array_equal(points.steps, error.steps)
    name = "held-out loss" if key == "eval_loss" else "held-out"
    label = f"{name}, ± {BAND} standard errors" if whole and len(error.known) else name
    return PlotLine(points, 1, label, BAND * error.values if whole else None, dots=True)


def not_drawn(points: dict[str, Curve]) -> list[str]:
    """Return what is missing from a plot, in words."""
    notes = []
    for key, found in points.items():
        if unknown := found.unknown:
            share = f"{len(unknown)} of {len(found)} steps"
            notes.append(f"{key} is not a finite number at {share} (crosses at the top): {few(unknown)}")
        if not len(found):
            notes.append(f"no {key} was recorded")
    return notes


def numbers(records: Sequence[Record], columns: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Return those of `columns` that any record has, and their values as text at evenly spread steps."""
    known = [column for column in columns if any(column in record for record in records)]
    return known, [[text_of(record.get(column)) for column in known] for record in some(records, ROWS)]


def some(records: Sequence[Record], limit: int) -> list[Record]:
    """Return at most `limit` of the records, evenly spread, the first and the last among them."""
    if len(records) <= limit:
        return list(records)
    return [records[int(at)] for at in np.linspace(0, len(records) - 1, limit)]


def text_of(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e-3 or abs(value) >= 1e6 else f"{value:.4f}"
    return "–" if value is None else str(value)


# --- samples, data, config ------------------------------------------------------------------------------------------


def samples(run: RunFolder) -> tuple[list[tuple[str, list[tuple[str, str]]]], list[str]]:
    """Return under each prompt the answers (step, text), oldest first; and what is left out, in words."""
    if not run.evaluations:
        return [], []
    chosen = some(run.evaluations, SAMPLES)
    asked = [str(sample.get("prompt")) for sample in run.evaluations[-1]["samples"] if isinstance(sample, dict)]
    left_out = []
    if len(chosen) < len(run.evaluations):
        left_out.append(f"{len(chosen)} of {len(run.evaluations)} evaluations are shown; samples.md has all")
    if len(asked) > PROMPTS:
        left_out.append(f"{PROMPTS} of {len(asked)} prompts are shown; samples.md has all")
    return [(prompt, [*answers_to(prompt, chosen)]) for prompt in asked[:PROMPTS]], left_out


def answers_to(prompt: str, evaluations: Sequence[Record]) -> list[tuple[str, str]]:
    found = []
    for evaluation in evaluations:
        name = "untrained" if evaluation["step"] == 0 else f"step {evaluation['step']}"
        for sample in evaluation["samples"]:
            if isinstance(sample, dict) and str(sample.get("prompt")) == prompt:
                text = str(sample.get("answer", ""))
                found.append((name, text[:ANSWER] + (" … (cut here)" if len(text) > ANSWER else "")))
    return found


def data_rows(run: RunFolder) -> list[tuple[str, str]]:
    """Return what the run was trained on, as (name, value)."""
    facts = run.fact("data") or {}
    found = []
    if run.known_config:
        found.append(("source", str(run.known_config.data.corpus or run.known_config.data.source)))
    for split in facts.get("rows") or {}:
        tokens = (facts.get("tokens") or {}).get(split, 0)
        found.append((f"{split.replace('_', ' ')} rows", f"{facts['rows'][split]:,} ({tokens:,} tokens)"))
    if run.known_config and (rows := run.fact("data", "rows", "train")):
        epochs = run.last_step * run.known_config.training.batch_size / rows
        found.append(("seen", f"{epochs:.2f} epochs in batches of {run.known_config.training.batch_size} rows"))
    if isinstance(share := facts.get("supervised_share"), float):
        found.append(("supervised", f"{share:.1%} of the tokens"))
    if facts.get("rows_cut"):
        found.append(("cut to the length", f"{facts['rows_cut']} rows"))
    length, rows = facts.get("length"), run.fact("data", "rows", "train")
    filled = f", {(facts['tokens']['train'] - rows) / (rows * length):.0%} of it filled on average" if rows else ""
    found.append(("length", f"{length or 'unknown'} tokens a row{filled}"))
    for split, corpus in (facts.get("corpus") or {}).items():
        found.append(
            (f"{split.replace('_', ' ')} text", f"{corpus['characters']:,} characters, sha256 {corpus['sha256']}")
        )
    found.append(("tokens sha256", str(facts.get("tokens_sha256", "not recorded"))))
    return [*found, ("tokenizer sha256", str(run.facts.get("tokenizer_sha256", "not recorded")))]


def config_changes(run: RunFolder) -> tuple[list[str], str]:
    """Return what differs from the recipe as it stands here now, a line a key; and why that cannot be said, if so.

    What the recipe leaves open is taken as this run decided it.
    """
    if (config := run.known_config) is None:
        return [], "the run's config cannot be read"
    try:
        recipe = configs.load(run.recipe_dir, hardware.get(config.hw))
    except RecipeError as error:
        return [], f"the recipe cannot be read here: {error.what}"
    training, rows = recipe.training, run.fact("data", "rows", "train")
    if training.precision == "auto":
        recipe = recipe.with_values(**{"training.precision": config.training.precision})
    if recipe.model.lora and config.model.lora and recipe.model.lora.tie_groups == "build":
        recipe = recipe.with_values(**{"model.lora.tie_groups": config.model.lora.tie_groups})
    if training.max_steps is None and training.num_epochs and rows:
        steps = steps_for(training.num_epochs, rows, training.batch_size)
        recipe = recipe.with_values(**{"training.max_steps": steps})
    return recipe.changes(config), ""


def ran(run: RunFolder) -> list[tuple[str, str]]:
    """Return what ran, out of the manifest, as (name, value)."""
    fact = run.fact
    versions = fact("backend", "versions") or {}
    dirty = {True: ", with changes that are not in it", False: "", None: ""}[fact("git_dirty")]
    rows = {
        "command": " ".join(map(str, fact("command") or [])),
        "recipe": fact("recipe"),
        "board": fact("reasons", "hw") or fact("hw"),
        "engine": fact("backend", "backend"),
        "device": fact("backend", "device"),
        "why": fact("backend", "reason"),
        "precision": fact("backend", "precision"),
        "processes and threads": f"{fact('backend', 'world')} and {fact('backend', 'threads')}",
        "compiled": fact("backend", "compiled"),
        "base": fact("base", "name"),
        "base parameters": fact("base_parameters"),
        "seed": fact("seed"),
        "start": fact("start"),
        "end": fact("end"),
        "parent": fact("parent"),
        "commit": f"{fact('git_commit')}{dirty}" if fact("git_commit") else None,
        "image": fact("image", "reference"),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "first loss": fact("first_loss"),
        "export": fact("export", "status"),
        "training digest": fact("training_digest"),
        "lock sha256": fact("lock_sha256"),
    }
    found = [(name, str(value)) for name, value in rows.items() if value not in (None, "")]
    notes = [("note", str(note)) for note in fact("backend", "notes") or []]
    resumed = [("resumed", f"after step {event.get('step')} at {event.get('at')}") for event in fact("resumed") or []]
    return found + notes + resumed
