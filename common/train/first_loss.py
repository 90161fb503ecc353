"""The gate of a run from random weights: its first loss is known before it trains."""

from __future__ import annotations

import math

import numpy as np

from common.engine import Array
from common.errors import VerificationError
from common.model.init import logit_variance
from common.model.weights import InitialWeights

BAND = 0.1  # nats per token on either side: precision and the draw of the weights, besides what the text does


def check_first_loss(loss: float, initial: InitialWeights, ids: Array) -> str:
    """Compare the loss of step 1 with that of the `initial` weights; return the comparison as a sentence.

    A model that knows nothing guesses among all ids, which costs ln(vocabulary), and half the variance of its logits
    more: the mean of ln(sum of exp) over normal logits. A text's frequent tokens draw logits of their own, whose mean
    strays by sqrt(variance x sum of p^2), p being the shares of the training tokens `ids` [N]; three of those are
    allowed. Weights that are not the initial ones, a loss that is a sum and a mask that counts padding all move the
    loss out of the band. Raises VerificationError.
    """
    vocabulary: int = initial.architecture["vocab_size"]
    variance = logit_variance(initial.initializer, initial.architecture)
    shares = np.bincount(ids, minlength=vocabulary) / len(ids)
    expected = math.log(vocabulary) + variance / 2
    band = BAND + 3 * math.sqrt(variance * float((shares**2).sum()))
    found = f"the first loss is {loss:.4f}; untrained weights give {expected:.2f} ± {band:.2f}"
    if not abs(loss - expected) <= band:  # written so that a NaN is outside
        todo = "do not trust this engine: report it with the manifest; recipe data show prints what it was given"
        raise VerificationError(found, where="step 1", todo=todo)
    return found
