"""The out-of-domain score in [0, 1]: how unusual an image is compared with the training images.

The raw measure is the Mahalanobis distance of the dispatcher's L2-normalized features under probabilistic PCA
(Tipping & Bishop 1999). It also counts the energy outside the principal subspace, relative to the mean variance
there. The score is the percentile of this distance among held-out training images.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize


@dataclass(frozen=True, eq=False)
class OutOfDomain:
    """Probabilistic PCA and score quantiles, fitted by ``training.clusters.fit_ood``.

    Attributes:
        mean: float32 [F]. basis: float16 [F, d], orthonormal columns.
        variance: float32 [d] along the columns. noise: float32 [1], mean variance of the other dimensions.
        quantiles: float32 [q], ascending: the raw measure of held-out images at evenly spaced percentiles.
    """

    layout: ClassVar[dict[str, str]] = {
        "mean": "float32 F",
        "basis": "float16 F d",
        "variance": "float32 d",
        "noise": "float32 1",
        "quantiles": "float32 q",
    }
    mean: Tensor
    basis: Tensor
    variance: Tensor
    noise: Tensor
    quantiles: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions F and d, and the number of quantiles."""
        return (*self.basis.shape, len(self.quantiles))

    def raw(self, features: Tensor) -> Tensor:
        """Features [B, F] of the dispatcher to squared distances float32 [B]."""
        return _raw([self], [features], features.new_zeros(len(features), dtype=torch.int64))

    def score(self, features: Tensor) -> Tensor:
        """Features [B, F] to scores [B]: the fraction of held-out training images that are less unusual."""
        return scores([self], [features], features.new_zeros(len(features), dtype=torch.int64))


def scores(models: Sequence[OutOfDomain], parts: Sequence[Tensor], owner: Tensor) -> Tensor:
    """Scores of the images of several models, one model after another, float32 [N].

    Everything except the products is computed for all images at once: a GPU spends its time on launches here.

    Args:
        models: with equal shapes.
        parts: the features of each model's images, [n, F].
        owner: the model of each image, int64 [N].
    """
    return quantile_scores(_raw(models, parts, owner), _of_each(models, "quantiles", owner))


def quantile_scores(raw: Tensor, quantiles: Tensor) -> Tensor:
    """Where each raw measure [N] lies between its ascending quantiles [N, q]: float32 [N] in [0, 1]."""
    last = quantiles.shape[1] - 1
    right = torch.searchsorted(quantiles, raw[:, None]).clamp(1, last)
    low, high = quantiles.gather(1, right - 1), quantiles.gather(1, right)
    within = ((raw[:, None] - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return ((right - 1 + within) / last).squeeze(1)


def _raw(models: Sequence[OutOfDomain], parts: Sequence[Tensor], owner: Tensor) -> Tensor:
    x = normalize(torch.cat([part.float() for part in parts])) - _of_each(models, "mean", owner)
    centered = x.split([len(part) for part in parts])
    inside = torch.cat([part @ model.basis.float() for part, model in zip(centered, models, strict=True)]).square()
    outside = (x.square().sum(dim=1) - inside.sum(dim=1)).clamp(min=0)
    return (inside / _of_each(models, "variance", owner)).sum(dim=1) + outside / _of_each(models, "noise", owner)[:, 0]


def _of_each(models: Sequence[OutOfDomain], name: str, owner: Tensor) -> Tensor:
    """A tensor of each image's model, [N, ...]."""
    return torch.stack([getattr(model, name) for model in models])[owner]
