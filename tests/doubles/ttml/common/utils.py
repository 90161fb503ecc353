"""A double of `ttml.common.utils`: seeds, and a context without gradients."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
from ttml import manual_seed
from ttml.autograd import AutoContext, GradMode


def set_seed(seed: int) -> None:
    """Python, numpy and ttml."""
    random.seed(seed)
    np.random.seed(seed)
    manual_seed(seed)


@contextlib.contextmanager
def no_grad() -> Iterator[None]:
    """Operations within it are not recorded; the mode before is restored."""
    context = AutoContext.get_instance()
    before = context.get_gradient_mode()
    context.set_gradient_mode(GradMode.DISABLED)
    try:
        yield
    finally:
        context.set_gradient_mode(before)
