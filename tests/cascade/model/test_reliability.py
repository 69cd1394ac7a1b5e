"""Reliability: bins of confidence, how many answers each has, and how many of them are right."""

import numpy as np
import pytest

from cascade.model.reliability import BINS, reliability


def test_a_hand_example() -> None:
    found = reliability(np.array([0.0, 0.05, 0.81, 0.89, 1.0]), np.array([1.0, 0.0, 1.0, 0.5, 1.0]))
    assert found["counts"] == [2, 0, 0, 0, 0, 0, 0, 0, 2, 1] and len(found["counts"]) == BINS
    assert found["confidence"] == [0.025, 0, 0, 0, 0, 0, 0, 0, 0.85, 1.0], "1.0 belongs to the last bin"
    assert found["right"] == [0.5, 0, 0, 0, 0, 0, 0, 0, 0.75, 1.0]


def test_as_many_answers_as_there_are() -> None:
    generator = np.random.default_rng(0)
    confidence = generator.uniform(size=500)
    right = (generator.uniform(size=500) < confidence).astype(float)
    found = reliability(confidence, right)
    assert sum(found["counts"]) == 500
    assert np.dot(found["counts"], found["right"]) / 500 == pytest.approx(right.mean(), abs=1e-3)
    assert max(abs(a - b) for a, b in zip(found["confidence"], found["right"], strict=True)) < 0.2
