"""What engines are asked, and what their answers hold."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from cascade import Engine, ItemError, Options, Prediction
from cascade.model.fusion import MODES


def embeddings(predictions: list[Prediction]) -> np.ndarray:
    """[N, D]."""
    return np.stack([a.embedding for a in predictions if a.embedding is not None])


def answers(engine: Engine, images: Sequence[Any], **wishes: object) -> list[Prediction]:
    return good(engine.predict(images, Options(embedding=True, **wishes)))  # type: ignore[arg-type]


def good(out: list[Prediction | ItemError]) -> list[Prediction]:
    assert all(isinstance(a, Prediction) for a in out), out
    return out  # type: ignore[return-value]


def numbers(p: Prediction) -> list[float]:
    return [p.confidence, *(x.score for x in p.labels), *(x.similarity for x in p.neighbors)]


def same(a: Prediction | ItemError, b: Prediction | ItemError) -> None:
    """Equal in everything that is a choice, and to float tolerance in everything that is a number."""
    assert isinstance(a, Prediction) and isinstance(b, Prediction), (a, b)
    choices = ("bundle", "version", "mode", "cluster", "masks")
    assert [getattr(a, n) for n in choices] == [getattr(b, n) for n in choices]
    assert [x.name for x in a.labels] == [x.name for x in b.labels]
    assert [x.name for x in a.neighbors] == [x.name for x in b.neighbors]
    np.testing.assert_allclose(numbers(a), numbers(b), rtol=1e-3, atol=1e-3)
    assert a.ood == pytest.approx(b.ood, abs=0.01), "a percentile of few images: it jumps where they lie close"
    if a.embedding is not None and b.embedding is not None:
        np.testing.assert_allclose(a.embedding, b.embedding, rtol=1e-3, atol=1e-3)


def mixture(*names: str, count: int = 24) -> list[Options]:
    """Every bundle in every mode, in turn."""
    kinds = [Options(bundle=n, mode=m, embedding=True) for n in names for m in MODES]
    return [kinds[i % len(kinds)] for i in range(count)]
