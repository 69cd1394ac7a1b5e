"""Reliability: how often answers with a certain confidence are right (the diagram of Guo et al. 2017)."""

from typing import Any

import numpy as np

BINS = 10


def reliability(confidence: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    """Answers in ``BINS`` bins of equal width in confidence, as plain numbers.

    Args:
        confidence: in [0, 1], [N]. right: 0 to 1, the share of times that each answer was right, [N].

    Returns:
        ``counts``, and the means ``confidence`` and ``right`` of each bin; 0 for an empty one.
    """
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    means = {
        name: (np.bincount(bins, weights=values, minlength=BINS) / np.maximum(counts, 1)).round(4).tolist()
        for name, values in (("confidence", confidence), ("right", right))
    }
    return {"counts": counts.tolist()} | means
