"""A launch as processes and containers are handed it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from common import config, hardware
from common.train.launch import Hosts, Launch
from tests.doubles.tiny_recipe import FROM_SCRATCH


def test_a_launch_goes_through_json_with_every_field(tmp_path):
    settings = ("training_config.learning_rate=0.1", 'eval_config.prompts=[an odd "word"]')
    launch = Launch(
        recipe_dir=FROM_SCRATCH,
        config=config.load(FROM_SCRATCH, hardware.get("n300"), settings, 3),
        engine="engines.ttml",
        reason="n300: as named",
        run="20260102T030405Z-from_scratch-n300-ab12",
        out=tmp_path,
        nodes=("/dev/tenstorrent/0",),
        departures=("batch_size",),
        warnings=("L003: clipping is off",),
        stop_at=2,
        resume=str(tmp_path / "run"),
        accept_changes=True,
        command=("recipe", "run"),
        overrides=settings,
        host={"kernel": "6", "pci": ["0000:01:00.0"]},
        git_commit="ab" * 20,
        git_dirty=False,
        image={"reference": "sha256:12", "target": "n300"},
        debug=True,
        stall_seconds=0.5,
        hosts=Hosts(2, "trainer:29500", 10),
    )
    defaults = {field.name: field.default for field in dataclasses.fields(Launch)}
    assert not [name for name, default in defaults.items() if getattr(launch, name) == default], "each is set here"
    text = launch.to_json()
    again = Launch.from_json(text)
    assert again == launch
    assert again.to_json() == text
    assert {name: type(value) for name, value in vars(again).items()} == {
        name: type(value) for name, value in vars(launch).items()
    }
    assert again.hw == hardware.get("n300")
    assert again.config.config_digest() == launch.config.config_digest()
    assert json.loads(text)["config"]["hw"] == "n300"
    assert isinstance(again.out, Path)
