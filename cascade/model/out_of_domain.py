"""The out-of-domain score in [0, 1]: how unusual an image is compared with the training images.

The raw measure is the Mahalanobis distance of the dispatcher's L2-normalized features under probabilistic PCA
(Tipping & Bishop 1999). It also counts the energy outside the principal subspace, relative to the mean variance
there. The score is the percentile of this distance among held-out training images.
"""

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

    def raw(self, features: Tensor) -> Tensor:
        """Features [B, F] of the dispatcher to squared distances float32 [B]."""
        x = normalize(features.float()) - self.mean
        inside = (x @ self.basis.float()).square()
        outside = (x.square().sum(dim=1) - inside.sum(dim=1)).clamp(min=0)
        return (inside / self.variance).sum(dim=1) + outside / self.noise

    def score(self, features: Tensor) -> Tensor:
        """Features [B, F] to scores [B]: the fraction of held-out training images that are less unusual."""
        raw = self.raw(features)
        last = len(self.quantiles) - 1
        right = torch.searchsorted(self.quantiles, raw).clamp(1, last)
        low, high = self.quantiles[right - 1], self.quantiles[right]
        within = ((raw - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
        return (right - 1 + within) / last
