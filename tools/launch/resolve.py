"""From what was typed to a Launch: the one place where a board is chosen, a config loaded and the machine read."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Sequence
from pathlib import Path

from common import config as configs
from common.config import Config
from common.errors import UsageError
from common.model import llama
from common.paths import ROOT
from common.train.launch import Hosts, Launch
from engines import registry
from tools import git
from tools.launch import lint
from tools.machine import detect, host
from tools.runs.folder import is_run, run_of

STALL = "RECIPES_STALL_SECONDS"


def resolve(
    recipe_dir: Path,
    *,
    hw: str | None = None,
    overrides: Sequence[str] = (),
    steps: int | None = None,
    world: int | None = None,
    stop_at: int | None = None,
    resume: str = "auto",
    accept_changes: bool = False,
    out: Path = ROOT / "runs",
    command: Sequence[str] = (),
    debug: bool = False,
    hosts: Hosts = Hosts(),  # noqa: B008 - frozen
    require_present: bool = True,
) -> Launch:
    """Return the launch of a recipe with the options of `recipe run`, by their names there.

    Raises UsageError for a config that is not valid, MachineError where the named board is not here and must be, or
    cannot compute the architecture that the config names.
    """
    for words in (*command, str(recipe_dir), str(out)):
        if words != words.encode(errors="ignore").decode():
            raise UsageError(f"{words!r} is not UTF-8", todo="rename it: manifests and containers take names as UTF-8")
    choice = detect.choose(hw, require_present)
    overrides = (*overrides, *mesh_override(world))
    config = configs.load(recipe_dir, choice.hardware, overrides, steps)
    resume = resume if resume in ("auto", "never") else str(Path(resume).expanduser().absolute())
    if choice.hardware.is_cpu and resume not in ("auto", "never"):
        config = tied_as(Path(resume), config)
    if config.model.architecture:  # a base's is known when it is here
        registry.engine_for(choice.hardware).refuse_model(llama.hf_config(config.model.architecture.model_dump()))
    commit, dirty = git.head()
    started = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())  # first in a run's name: names sort by it
    return Launch(
        recipe_dir=recipe_dir,
        config=config,
        engine=registry.name_for(choice.hardware),
        reason=choice.reason,
        run=f"{started}-{config.recipe}-{choice.hardware.name}-{secrets.token_hex(2)}",
        out=out.expanduser().absolute(),
        nodes=choice.nodes,
        departures=tuple(map(key_of, config.departures())) if choice.hardware.is_cpu else (),
        warnings=tuple(lint.lint(config, choice.hardware)),
        stop_at=stop_at,
        resume=resume,
        accept_changes=accept_changes,
        command=tuple(command),
        overrides=overrides,
        host=host.facts(choice.nodes),
        git_commit=commit,
        git_dirty=dirty,
        debug=debug,
        stall_seconds=stall_seconds(),
        hosts=hosts,
    )


def tied_as(resume: Path, config: Config) -> Config:
    """Return the config with the tie groups of the run or checkpoint `resume`, where it leaves them to the build.

    A CPU trains any groups: so it goes on with those of whatever build of ttml the run was trained by.
    """
    run = run_of(resume)
    if not (config.model.lora and config.model.lora.tie_groups == "build" and is_run(run)):
        return config
    theirs = configs.load_resolved(run / "config.resolved.yaml").model.lora
    return config.with_values(run.name, **{"model.lora.tie_groups": theirs.tie_groups}) if theirs else config


def stall_seconds() -> float | None:
    """Return the seconds of RECIPES_STALL_SECONDS; None where it is not set. Raises UsageError."""
    text = os.environ.get(STALL)
    if not text:
        return None
    with contextlib.suppress(ValueError):
        if 0 <= (value := float(text)) < float("inf"):
            return value
    raise UsageError(f"{STALL}={text} is no number of seconds", todo="set it to seconds, or to 0 to watch nothing")


def mesh_override(world: int | None) -> tuple[str, ...]:
    """Return `--world` as the setting it stands for: manifests, results.yaml and `recipe repro` know settings."""
    return () if world is None else (f"device_config.mesh_shape=[1,{world}]",)


def key_of(departure: str) -> str:
    """Return `scheduler.type` of `training_config.scheduler.type: cosine (...)`."""
    return departure.split(":", 1)[0].partition(".")[2]
