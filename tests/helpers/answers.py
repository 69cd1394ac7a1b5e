"""What answers hold."""

import numpy as np

from cascade import Prediction


def embeddings(found: list[Prediction]) -> np.ndarray:
    """[N, D]."""
    return np.stack([a.embedding for a in found if a.embedding is not None])
