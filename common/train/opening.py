"""How a run begins: what it writes down first, and what a resumed one takes over from the run until then."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from common.data.tokens import TokenDataset
from common.engine import BackendInfo
from common.files import made_whole, utc_now, write_atomic
from common.train import metrics
from common.train.checkpoint import Checkpoint
from common.train.manifest import BaseFacts, DataFacts, Manifest, Resumption, launch_facts
from common.train.plan import Plan
from common.train.resume import Start


def keep_decisions(plan: Plan, start: Start) -> Plan:
    """Return the plan with what a resumed run decided once, as it fixes bits: compile; threads if not configured."""
    if start.checkpoint is None:
        return plan
    state, device = start.checkpoint.state, plan.config.device
    decided: dict[str, Any] = {"device.compile": "always" if state["compiled"] else "never"}
    if device.threads is None and state.get("world", 1) == device.devices:
        decided["device.threads"] = state["threads"]
    return replace(plan, config=plan.config.with_values(**decided))


def open_manifest(plan: Plan, start: Start) -> Manifest:
    """Write and return the manifest: of a new run, or of the run that goes on, with the resumption noted."""
    launch, config, base = plan.launch, plan.config, plan.base
    now = {
        "command": list(launch.command),
        "overrides": list(launch.overrides),
        "config_digest": config.config_digest(),
        **launch_facts(launch),
    }
    event = Resumption(at=utc_now(), step=start.step, notes=start.notes, **now)
    if start.manifest is not None:
        manifest = start.manifest
        keep_config(plan, start)
        manifest.exit_reason, manifest.end = "running", None
        manifest.resumed = [*manifest.resumed, event]
        manifest.save(start.folder)
        return manifest
    write_atomic(start.folder / "config.resolved.yaml", config.to_yaml())
    if base.initial:  # a tokenizer of this corpus, and the run must outlive the cache
        with made_whole(start.folder / "tokenizer") as kept:
            for file in base.folder.iterdir():
                shutil.copy(file, kept)
    manifest = Manifest(
        run=start.folder.name,
        recipe=config.recipe,
        recipe_dir=str(launch.recipe_dir),
        start=utc_now(),
        end=None,
        exit_reason="running",
        parent=start.parent,
        resumed=[event] if start.parent else [],
        hw=plan.hw.name,
        reasons=plan.reasons,
        seed=config.training.seed,
        steps=config.training.max_steps or 0,
        training_digest=plan.training_digest,
        base=BaseFacts(name=base.name, identity=base.identity, origin=base.origin, licence=base.licence),
        data=data_facts(plan.dataset),
        tokenizer_sha256=plan.tokenizer.sha256,
        **now,
    )
    manifest.save(start.folder)
    return manifest


def data_facts(data: TokenDataset) -> DataFacts:
    """Return what a run is trained on, as its manifest has it."""
    return DataFacts(
        source_key=data.source_key,
        tokens_sha256=data.tokens_sha256,
        length=data.length,
        rows={name: len(split) for name, split in data.splits.items()},
        tokens={name: split.tokens for name, split in data.splits.items()},
        supervised_share=data.info.get("supervised_share"),
        rows_cut=len(data.info.get("cut", [])),
        corpus=data.info.get("corpus"),
    )


def keep_config(plan: Plan, start: Start) -> None:
    """Write config.resolved.yaml as the run goes on with it; keep the one until now beside it if it differs."""
    path, text = start.folder / "config.resolved.yaml", plan.config.to_yaml()
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        path.rename(path.with_name(f"config.until-step-{start.step}.{int(time.time())}.yaml"))
        write_atomic(path, text)


def changed_versions(found: Checkpoint, info: BackendInfo) -> list[str]:
    """Return a line for each library, engine or device that is another than the checkpoint's: the bits end there."""
    state = found.state
    then_facts = {"backend": state.get("backend", info.backend), "device": state.get("device", info.device)}
    then = {**then_facts, "compiled": state["compiled"], **state["versions"]}
    now = {"backend": info.backend, "device": info.device, "compiled": info.compiled, **info.versions}
    both = [name for name in then if name in now]
    lines = [f"changed: {name}: {then[name]} -> {now[name]}" for name in both if then[name] != now[name]]
    return [*lines, "not bit-exact from here"] if lines else []


@dataclass(frozen=True)
class Past:
    """The records of a run up to the step that it starts from; of a new run there are none."""

    # Of evaluations.jsonl, as far as they are of the rows that are evaluated now.
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    recent_losses: list[float] = field(default_factory=list)  # the training losses since the last evaluation
    evaluated: bool = False  # whether the step itself was evaluated: a rank's death may have come after its checkpoint


def take_over(found: Checkpoint, folder: Path, dataset: TokenDataset, rows: int, say: Callable[[str], None]) -> Past:
    """Cut the records of metrics and evaluations back to the checkpoint's step, and return them.

    A branch copies its parent's into its own `folder`. `rows` are evaluated from here on.
    """
    origin = found.folder.parent.parent
    kept = metrics.cut_back(origin / "metrics.jsonl", found.step, folder / "metrics.jsonl")
    evaluations: list[dict[str, Any]] = []
    if found.state["tokens_sha256"] == dataset.tokens_sha256:  # else they are of other rows
        name = "evaluations.jsonl"
        evaluations = metrics.cut_back(origin / name, found.step, folder / name, lambda it: len(it["nll"]) == rows)
        if not evaluations:
            say(f"earlier evaluations are of other rows than the {rows} of now: left out")
    last = max((record["step"] for record in evaluations), default=0)
    recent = [record["loss"] for record in kept if "loss" in record and record["step"] > last]
    evaluated = any("eval_loss" in record and record["step"] == found.step for record in kept)
    return Past(evaluations=evaluations, recent_losses=recent, evaluated=evaluated)
