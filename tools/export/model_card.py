"""The README.md of an export: what the model is, how to use it, what was measured.

It holds no number that the run did not make.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from common.config.schema import Evaluation
from common.data import texts
from common.files import read_json
from common.train.console import clock
from common.train.evaluate import HeldOut
from tools.export.check import ExportCheck
from tools.export.hf_folder import base_for_peft, sampling
from tools.runs.folder import at_step
from tools.runs.trained import TrainedRun
from tools.templates import render

TEMPLATES = Path(__file__).with_name("templates")


def merged_card(folder: Path, run: TrainedRun, dtype: str, outcome: ExportCheck) -> str:
    """Return the README.md of export/merged, the folder `folder`."""
    name = "scratch" if run.base.initial else "merged"
    end = read_json(folder / "config.json").get("eos_token_id")
    return render(TEMPLATES / f"{name}.md.j2", **facts(run, outcome), library="transformers", dtype=dtype, end=end)


def adapter_card(run: TrainedRun, outcome: ExportCheck) -> str:
    """Return the README.md of export/adapter."""
    return render(TEMPLATES / "adapter.md.j2", **facts(run, outcome), library="peft")


def facts(run: TrainedRun, outcome: ExportCheck) -> dict[str, Any]:
    """Return what both cards say, all of it from the run's own files."""
    config, manifest = run.config, run.manifest
    training, lora = config.training, config.model.lora
    steps = [record for record in run.steps if record["step"] <= run.step]
    prompt, example = example_of(run)
    system = config.data.system_prompt
    rows = manifest.data.rows
    commit = manifest.git_commit
    return {
        "recipe": config.recipe,
        "base_name": run.base.name,
        "base_id": hub_id(run),
        "named_base": named_base(run),
        "base_origin": run.base.name if local(run) else run.base.origin,
        "base_identity": run.base.identity[:16],
        "local_base": base_for_peft(run)[1] is None,
        "licence": run.base.licence,
        "rope_theta_of_5": rope_theta_of_5(run),
        "lora": lora is not None,
        "scratch": run.base.initial is not None,
        "data": data_line(run),
        "parameters": f"{run.base.parameters:,}" if run.base.parameters else None,
        "bits": bits_line(run),
        "evaluated": evaluated(run, outcome),
        "losses": losses(run),
        "proof": proof(outcome),
        "train_rows": rows["train"],
        "seed": training.seed,
        "device": f"{config.hw}, {manifest.backend.device}" if manifest.backend else config.hw,
        "precision": training.precision,
        "steps": run.step if run.step == training.max_steps else f"{run.step} of {training.max_steps}",
        "batch_size": config.training.batch_size,
        "tokens": f"{sum(record['supervised_tokens'] for record in steps):,}",
        "time": clock(math.fsum(record["seconds"] for record in steps)),
        "method": f"LoRA, rank {lora.rank}, alpha {lora.alpha:g}, on {', '.join(lora.target_modules)}"
        if lora
        else "all weights trained",
        "optimizer": training.optimizer.type,
        "learning_rate": f"{training.learning_rate:g}",
        "scheduler": training.scheduler.type,
        "commit": f"`{commit}`{', with changes' if manifest.git_dirty else ''}" if commit else None,
        "sampling": sampling_line(config.eval),
        "greedy": config.eval.temperature == 0,
        "context": run.base.architecture["max_position_embeddings"],
        "answer_tokens": config.eval.max_new_tokens,
        "training_digest": run.checkpoint.state["training_digest"][:16],
        "tokens_sha256": manifest.data.tokens_sha256[:16],
        "prompt": python_text(prompt),
        "example": example,
        "system_turn": f'{{"role": "system", "content": {python_text(system)}}}, ' if system else "",
    }


def sampling_line(settings: Evaluation) -> str:
    """Return how answers are chosen, as generation_config.json has it."""
    chosen = sampling(settings)
    greedy = ["greedy (temperature 0)"] if settings.temperature == 0 else []
    named = [f"{name} {value:g}" for name, value in chosen.items() if name != "do_sample" and value]
    return ", ".join(greedy + named)


def losses(run: TrainedRun) -> dict[str, str]:
    """Return the rows of the numbers table; none when the exported step was not evaluated."""
    before, after = run.held_out(0), run.held_out(run.step)
    if after is None:
        return {}
    table = {f"this model (step {run.step})": with_error(after)}
    if before:
        gain, error = after.improvement_over(before)
        before_name = "random weights" if run.base.initial else "base"
        table = {before_name: with_error(before), **table, "gain, paired by row": f"{gain:.4f} ± {error:.4f}"}
    return table


def evaluated(run: TrainedRun, outcome: ExportCheck) -> str | None:
    """Return in what precision, and on how many of the held-out rows, the exported step was evaluated; None if it was
    not, neither by the run nor by the export's check.
    """
    own, held_out = run.held_out(run.step), run.manifest.data.rows["held_out"]
    rows = outcome.held_out_rows if own is None else len(own.nll)
    return f"{run.evaluated_in} on {'all' if rows == held_out else f'{rows} of'} {held_out} rows" if rows else None


def rope_theta_of_5(run: TrainedRun) -> float | None:
    """Return the rotary base of a base whose config.json has it in `rope_parameters` alone, where only 5 look."""
    architecture = run.base.architecture
    theta = (architecture.get("rope_parameters") or {}).get("rope_theta")
    return None if "rope_theta" in architecture else theta


def bits_line(run: TrainedRun) -> str | None:
    """Return the bits per byte of the exported step, for a corpus."""
    found = at_step(run.scores, run.step)
    if found is None or "bits_per_byte" not in found:
        return None
    error = "" if found["bits_per_byte_se"] is None else f" ± {found['bits_per_byte_se']:.4f}"
    return f"Bits per byte, which can be compared between tokenizers: {found['bits_per_byte']:.4f}{error}."


def with_error(rows: HeldOut) -> str:
    return f"{rows.loss:.4f} ± {rows.standard_error:.4f}"


def proof(outcome: ExportCheck) -> str:
    """Return a sentence on what the export's check found."""
    if not outcome.losses or outcome.run_loss is None:
        return f"The exported weights were not measured: {outcome.reason}."
    parts = " and ".join(f"{loss:.4f} ({name})" for name, loss in outcome.losses.items())
    loader = "transformers and PEFT" if "adapter" in outcome.losses else "transformers"
    rows = "all" if outcome.rows == outcome.held_out_rows else str(outcome.rows)
    return (
        f"Loaded again by plain {loader}, this export gave {parts} on {rows} of those rows, where "
        f"the run measured {outcome.run_loss:.4f}: {outcome.status}."
    )


def example_of(run: TrainedRun) -> tuple[str, tuple[str, str] | None]:
    """Return the prompt of the card, with the base's and the trained model's answer to it, quoted: the first one of the
    evaluation of the exported step; a greeting, without answers, where there was none.
    """
    before, after = run.evaluation(0), run.evaluation(run.step)
    if not (before and after and after["samples"]):
        return "Hello!", None
    answers = (quoted(record["samples"][0]["answer"]) for record in (before, after))
    return after["samples"][0]["prompt"], (next(answers), next(answers))


def quoted(text: str) -> str:
    """Return the text as a Markdown quotation."""
    return "\n".join(f"> {line}".rstrip() for line in (text or "(nothing)").splitlines())


def local(run: TrainedRun) -> bool:
    """Return whether the base is somebody's folder: its path says nothing to others and may say too much."""
    return run.base.origin == str(run.base.folder)


def hub_id(run: TrainedRun) -> str | None:
    """Return owner/name on the Hub that the base comes from, if any."""
    found = None if local(run) else re.match(r"[\w.-]+/[\w.-]+", run.base.origin)
    return found.group() if found else None


def named_base(run: TrainedRun) -> str:
    """Return what the code of the adapter's card loads as its base: a name on the Hub, or a path to be filled in."""
    return hub_id(run) or f"path/to/{run.base.name}"


def data_line(run: TrainedRun) -> str:
    data = run.config.data
    if data.corpus:
        about = texts.locked().get(data.corpus, {}).get("title", "a text of your own, whose licence you know")
        return f"the corpus `{Path(data.corpus).name}`: {about}; its tokenizer was made from its training part"
    assert data.source is not None, "rows have a source"
    name = data.source.rpartition("/")[2]
    control = "" if data.control == "none" else f", as a negative control: {data.control.replace('_', ' ')}"
    return f"`{name}` of the recipe `{run.config.recipe}`, whose README states its licence{control}"


def python_text(text: str) -> str:
    """Return a string as Python and JSON both write it."""
    return json.dumps(text, ensure_ascii=False)
