"""The router assigns an image to a cluster, and so to an expert (method.md §3; paper §3.3).

There are three kinds, each a small dataclass of tensors with one method, ``probabilities``. They are fitted offline
in ``training/clusters.py`` and evaluated here with plain tensor algebra.

    features [B, F] of the dispatcher -> p(cluster) [B, K]

A new kind is a dataclass with ``kind``, ``probabilities``, tensor fields and their ``layout``. Add it to ``KINDS``, so
that bundles can contain it.
"""

from dataclasses import dataclass, fields
from functools import cached_property
from math import log, pi
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear, normalize

TEMPERATURE = 0.1  # SwAV's, method.md §2


class Router(Protocol):
    """What the engine and training need from a router."""

    kind: ClassVar[str]
    layout: ClassVar[dict[str, str]]

    def probabilities(self, features: Tensor) -> Tensor:
        """Features float [B, F] of the dispatcher to p(cluster), float [B, K], rows summing to 1."""
        ...


@dataclass(frozen=True, eq=False)
class Prototypes:
    """Self-supervised prototypes, grouped into clusters (the default).

    ``p(k) = sum over the prototypes c of cluster k of softmax(z . c / 0.1)``, where z is the L2-normalized output
    of the dispatcher's SwAV head.

    Attributes:
        head: float16 [P, F], bias: float16 [P]: SwAV's linear head.
        prototypes: float16 [C, P], L2-normalized rows.
        cluster: int64 [C], the cluster of each prototype.
        clusters: int64 [1], the number of clusters K.
    """

    kind: ClassVar[str] = "prototypes"
    layout: ClassVar[dict[str, str]] = {
        "head": "float16 P F",
        "bias": "float16 P",
        "prototypes": "float16 C P",
        "cluster": "int64 C",
        "clusters": "int64 1",
    }
    head: Tensor
    bias: Tensor
    prototypes: Tensor
    cluster: Tensor
    clusters: Tensor

    @cached_property
    def count(self) -> int:
        """``clusters`` as a number, read from the device once."""
        return int(self.clusters)

    def probabilities(self, features: Tensor) -> Tensor:
        z = normalize(linear(features.float(), self.head.float(), self.bias.float()))
        share = (z @ self.prototypes.float().T / TEMPERATURE).softmax(dim=1)
        return share.new_zeros(len(features), self.count).index_add_(1, self.cluster, share)


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """Gaussian mixture with full covariances on whitened PCA of the L2-normalized features (paper §3.3).

    Attributes:
        mean: float64 [F], basis: float64 [F, d]: PCA with whitening folded in.
        means: float64 [K, d]. precisions: float64 [K, d, d], Cholesky factors of the precisions.
        weights: float64 [K], mixture weights.
    """

    kind: ClassVar[str] = "gmm"
    layout: ClassVar[dict[str, str]] = {
        "mean": "float64 F",
        "basis": "float64 F d",
        "means": "float64 K d",
        "precisions": "float64 K d d",
        "weights": "float64 K",
    }
    mean: Tensor
    basis: Tensor
    means: Tensor
    precisions: Tensor
    weights: Tensor

    def probabilities(self, features: Tensor) -> Tensor:
        x = (normalize(features.double()) - self.mean) @ self.basis
        distance = ((x[:, None] - self.means).unsqueeze(2) @ self.precisions).squeeze(2).square().sum(dim=2)
        determinant = self.precisions.diagonal(dim1=1, dim2=2).log().sum(dim=1)
        logits = self.weights.log() + determinant - 0.5 * (distance + x.shape[1] * log(2 * pi))
        return logits.softmax(dim=1).float()


@dataclass(frozen=True, eq=False)
class Centroids:
    """Nearest centroid in the same whitened space; p is a softmax of minus half the squared distances.

    Attributes:
        mean: float64 [F], basis: float64 [F, d]: PCA with whitening folded in.
        centroids: float64 [K, d].
    """

    kind: ClassVar[str] = "centroid"
    layout: ClassVar[dict[str, str]] = {"mean": "float64 F", "basis": "float64 F d", "centroids": "float64 K d"}
    mean: Tensor
    basis: Tensor
    centroids: Tensor

    def probabilities(self, features: Tensor) -> Tensor:
        x = (normalize(features.double()) - self.mean) @ self.basis
        return (-0.5 * torch.cdist(x, self.centroids).square()).softmax(dim=1).float()


KINDS: tuple[type[Prototypes] | type[GaussianMixture] | type[Centroids], ...] = (
    Prototypes,
    GaussianMixture,
    Centroids,
)


def tensors(router: Router) -> dict[str, Tensor]:
    """A router's tensors by field name, as the bundle stores them."""
    return {f.name: getattr(router, f.name) for f in fields(router)}  # type: ignore[arg-type]


@dataclass(frozen=True)
class Calibration:
    """Platt scaling of the log-odds of the highest probability to a calibrated confidence.

    The confidence is the probability that another view of the same image is routed to the same cluster. It is
    fitted on held-out images; see docs/decisions/0003-routing-confidence.md.
    """

    slope: float = 1.0
    intercept: float = 0.0

    def confidence(self, probabilities: Tensor) -> Tensor:
        """p(cluster) [B, K] to calibrated confidence [B] in [0, 1]."""
        return torch.sigmoid(self.slope * log_odds(probabilities.max(dim=1).values) + self.intercept)


def log_odds(p: Tensor) -> Tensor:
    """Log-odds of probabilities, finite even at 0 and 1."""
    return torch.logit(p.double(), eps=1e-6).float()


def route(router: Router | None, calibration: Calibration, features: Tensor) -> tuple[Tensor, Tensor]:
    """Cluster int64 [B] and calibrated confidence float [B]; without a router cluster 0 with confidence 1."""
    if router is None:
        return features.new_zeros(len(features), dtype=torch.int64), features.new_ones(len(features))
    probabilities = router.probabilities(features)
    return probabilities.argmax(dim=1), calibration.confidence(probabilities)
