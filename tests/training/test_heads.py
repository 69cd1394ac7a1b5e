"""Linear heads: the penalty by cross-validation, the temperature, and classes without images."""

import numpy as np
import pytest
import torch

from cascade.model.heads import Linear
from training import heads

CLASSES = 4


def blobs(count: int, spread: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features around one random center for each class: float32 [N, 16], int64 [N]."""
    generator = np.random.default_rng(seed)
    centers = np.random.default_rng(7).normal(size=(CLASSES, 16))
    labels = np.arange(count) % CLASSES
    return (centers[labels] + spread * generator.normal(size=(count, 16))).astype(np.float32), labels


def test_a_fitted_head_classifies_new_features() -> None:
    fitted = heads.fit(*blobs(200, 0.5), CLASSES)
    assert heads.accuracy(fitted.head, *blobs(200, 0.5, seed=1)) > 0.95


def noisy(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Wide features of which most dimensions are noise, float32 [120, 216]."""
    features, labels = blobs(120, 1.0, seed)
    noise = np.random.default_rng(seed + 100).normal(size=(120, 200)).astype(np.float32)
    return np.concatenate([features, noise], axis=1), labels


def test_the_penalty_is_the_one_that_generalizes(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = heads.fit(*noisy(0), CLASSES)
    accuracies = {}
    for penalty in heads.PENALTIES:
        monkeypatch.setattr(heads, "_choose", lambda *_, fixed=penalty: fixed)
        accuracies[penalty] = heads.accuracy(heads.fit(*noisy(0), CLASSES).head, *noisy(1))
    assert accuracies[chosen.penalty] >= max(accuracies.values()) - 0.05
    assert accuracies[chosen.penalty] >= accuracies[min(heads.PENALTIES)]


def test_the_same_features_give_the_same_head() -> None:
    first, second = (heads.fit(*noisy(0), CLASSES, seed=3) for _ in range(2))
    assert first.penalty == second.penalty and torch.equal(first.head.weight, second.head.weight)


def test_a_class_of_one_image_is_fitted_and_an_absent_one_is_never_the_answer() -> None:
    features, labels = blobs(60, 0.5)
    keep = (labels != 2) | (np.arange(60) == 2)
    fitted = heads.fit(features[keep], labels[keep], CLASSES + 1)
    scores = heads.logits(fitted.head, features)
    assert np.isfinite(scores).all() and (scores[:, CLASSES] < -1e8).all()


@pytest.mark.parametrize("factor", [0.2, 5.0])
def test_the_temperature_undoes_a_scale_of_the_logits(factor: float) -> None:
    features, labels = blobs(400, 1.5)
    head = heads.fit(features, labels, CLASSES).head
    held_out = blobs(400, 1.5, seed=1)
    base, first = heads.calibrated(head, *held_out)
    scaled, second = heads.calibrated(Linear(head.weight * factor, head.bias * factor), *held_out)
    assert second == pytest.approx(first * factor, rel=0.02)
    torch.testing.assert_close(scaled.weight, base.weight, rtol=0.02, atol=1e-3)
    assert heads.calibration_error_of(base, *blobs(400, 1.5, seed=2)) < 0.08
