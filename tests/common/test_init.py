from __future__ import annotations

import hashlib

import numpy as np

from common.model.init import normal, uniform

GOLDEN = [
    "0x1.b027dc0000000p-4",
    "-0x1.44fcc60000000p-4",
    "0x1.1fbd840000000p-4",
    "0x1.72cd040000000p-9",
    "-0x1.c0aa7e0000000p-5",
    "-0x1.7096700000000p-4",
]
GOLDEN_HASH = "44a3e6585ba524bc"


def test_the_bits_are_fixed():
    """A golden vector: the same on every numpy that promises its raw bits."""
    values = uniform(5489, "model.layers.0.self_attn.q_proj.weight", (2, 3), 0.125)
    assert values.dtype == np.float32
    assert [float(value).hex() for value in values.ravel()] == GOLDEN
    assert hashlib.sha256(uniform(7, "x", (64, 64), 1.0).tobytes()).hexdigest()[:16] == GOLDEN_HASH


def test_seed_and_name_make_other_values_and_shape_does_not():
    first = uniform(0, "a", (4, 8), 1.0)
    assert not np.array_equal(first, uniform(1, "a", (4, 8), 1.0))
    assert not np.array_equal(first, uniform(0, "b", (4, 8), 1.0))
    assert np.array_equal(first.ravel(), uniform(0, "a", (32,), 1.0))


def test_uniform_fills_its_range_evenly():
    values = uniform(0, "a", (100_000,), 0.5)
    assert -0.5 <= values.min() < -0.499
    assert 0.499 < values.max() <= 0.5
    assert abs(values.mean()) < 0.005
    assert abs(values.var() - 1 / 12) < 0.001


def test_normal_has_its_moments_and_is_finite():
    values = normal(0, "a", (100_000,), 0.02)
    assert values.dtype == np.float32
    assert np.isfinite(values).all()
    assert abs(values.mean()) < 0.0003
    assert abs(values.std() / 0.02 - 1) < 0.01
    assert abs((np.abs(values) < 0.02).mean() - 0.6827) < 0.006
    assert normal(0, "a", (3, 5), 0.02).shape == (3, 5)
