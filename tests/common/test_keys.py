"""No key of a config is left out of the runs that change each one."""

from __future__ import annotations

from common.config.load import Config, _keys
from tests.support.key_changes import CHANGES


def test_the_table_has_every_key():
    keys = {".".join(path) for path in _keys(Config)}
    sections = {key for key in keys if any(other.startswith(f"{key}.") for other in keys)}
    shapes = {key for key in keys if key.startswith("model_config.architecture.")}  # all of them refused together
    assert set(CHANGES) == keys - sections - shapes | {"model_config.lora", "model_config.architecture"}
