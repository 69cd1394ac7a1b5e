"""Linear heads on fixed features: multinomial logistic regression, with cross-validated penalty and temperature.

This is the baseline of every supervised training and the probe of every evaluation.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch.nn.functional import cross_entropy

from cascade.model.heads import Linear
from cascade.model.reliability import reliability

FOLDS = 3
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""L2 penalties to try, as multiples of 1 / N on features of unit variance; scikit-learn's C is 1 / (N * L2)."""
FEW = 4000  # most images for choosing the penalty
NEVER = -1e9  # bias of a class without training images: it keeps its place but is never predicted
BINS = 15


@dataclass(frozen=True)
class Fitted:
    """A head and the penalty that cross-validation chose for it."""

    head: Linear
    penalty: float


def fit(features: np.ndarray, labels: np.ndarray, classes: int, *, balanced: bool = False, seed: int = 0) -> Fitted:
    """Fit logistic regression on features float32 [N, F] with labels int64 [N]; scaling is folded into the head.

    Args:
        classes: number of classes; those without images are never predicted.
        balanced: weight rare classes as much as frequent ones.
    """
    mean = features.mean(axis=0)
    scale = max(float((features - mean).std()), 1e-12)  # 0 if an embedding has collapsed
    x = ((features - mean) / scale).astype(np.float64)
    weights = "balanced" if balanced else None
    with _quiet():
        penalty = _choose(x, labels, weights, seed)
        model = _logistic(penalty, weights).fit(x, labels)
    weight, bias = model.coef_, model.intercept_
    if len(weight) == 1:  # scikit-learn keeps one row for two classes
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    weight = weight / scale
    bias = bias - weight @ mean
    head = Linear(torch.zeros(classes, features.shape[1]), torch.full((classes,), NEVER))
    head.weight[model.classes_] = torch.from_numpy(weight).float()
    head.bias[model.classes_] = torch.from_numpy(bias).float()
    return Fitted(head, penalty)


def accuracy(head: Linear, features: np.ndarray, labels: np.ndarray) -> float:
    """Share of features [N, F] that the head classifies correctly, in [0, 1]."""
    return float((logits(head, features).argmax(axis=1) == labels).mean())


def loss(head: Linear, features: np.ndarray, labels: np.ndarray) -> float:
    """Cross-entropy, in nats, of the head on features [N, F] with labels int64 [N]."""
    return float(cross_entropy(torch.from_numpy(logits(head, features)), torch.from_numpy(labels)))


def logits(head: Linear, features: np.ndarray) -> np.ndarray:
    """Features float32 [N, F] to float32 [N, C]."""
    return np.asarray(features @ head.weight.float().numpy().T + head.bias.numpy())


def calibrated(head: Linear, features: np.ndarray, labels: np.ndarray) -> tuple[Linear, float]:
    """Temperature scaling (Guo et al. 2017): divide the logits by the temperature that fits validation images best.

    Returns:
        The head, and the temperature.
    """
    z, y = torch.from_numpy(logits(head, features)).double(), torch.from_numpy(labels)
    if not len(y):
        return head, 1.0
    result = minimize_scalar(lambda t: float(cross_entropy(z / np.exp(t), y)), bounds=(-3, 3), method="bounded")
    temperature = float(np.exp(result.x))
    return Linear(head.weight / temperature, head.bias / temperature), temperature


def calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Expected calibration error (Guo et al. 2017) in 15 bins: |accuracy - confidence|, weighted by bin size."""
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = [abs(correct[bins == b].sum() - confidence[bins == b].sum()) for b in range(BINS)]
    return float(sum(gaps) / len(confidence))


def calibration_error_of(head: Linear, features: np.ndarray, labels: np.ndarray) -> float:
    """Calibration error of the head's most likely class on features [N, F]."""
    return calibration_error(*_surest(head, features, labels))


def reliability_of(head: Linear, features: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Reliability of the head's most likely class on features [N, F] with labels int64 [N]."""
    return reliability(*_surest(head, features, labels))


def _surest(head: Linear, features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The probability of the most likely class, and whether it is right, float [N] each."""
    confidence, answer = torch.from_numpy(logits(head, features)).softmax(dim=1).max(dim=1)
    return confidence.numpy(), (answer.numpy() == labels).astype(float)


def _choose(x: np.ndarray, labels: np.ndarray, weights: str | None, seed: int) -> float:
    """The penalty with the best accuracy on held-out folds; ties go to the larger one."""
    if len(PENALTIES) == 1:
        return PENALTIES[0]
    order = np.random.default_rng(seed).permutation(len(x))[:FEW]
    fold = np.empty(len(order), np.int64)
    by_class = np.argsort(labels[order], kind="stable")
    fold[by_class] = np.arange(len(order)) % FOLDS  # every fold has its share of each class
    right = dict.fromkeys(PENALTIES, 0)
    for k in range(FOLDS):
        train, test = order[fold != k], order[fold == k]
        if len(np.unique(labels[train])) < 2:
            continue
        for penalty in PENALTIES:
            model = _logistic(penalty, weights, iterations=100).fit(x[train], labels[train])
            right[penalty] += int((model.predict(x[test]) == labels[test]).sum())
    return max(PENALTIES, key=lambda p: (right[p], p))


@contextmanager
def _quiet() -> Iterator[None]:
    """Use one thread, because contention between OpenMP and BLAS threads turns seconds into minutes.

    Warnings are silenced, too: a fit that stops at its last iteration gives an equally good head.
    """
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


def _logistic(penalty: float, weights: str | None, iterations: int = 300) -> LogisticRegression:
    return LogisticRegression(C=1 / penalty, max_iter=iterations, tol=1e-3, class_weight=weights)
