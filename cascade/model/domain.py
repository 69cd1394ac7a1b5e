"""Domains: how the plain backbone sees a bundle's images, used to dispatch an image to the right bundle.

A domain is a few prototypes of pooled activations at a stage of the frozen backbone, and the scatter of its images
around them. It is fitted on the bundle's own images, without labels and without the other bundles
(``training.domains``). All domains are compared in one metric: nearest prototype by the Mahalanobis distance of their
mean scatter, which is linear discriminant analysis with several prototypes per class.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

MAX_WIDTH = 96
"""Wider activations are projected at random to this width, so that a domain takes about 20 KB."""
SHRINKAGE = 0.05  # of the scatter towards a sphere
UNKNOWN = 6.0
"""Strangeness, in spreads, above which an image no longer belongs to a domain (decision 20)."""
TEMPERATURES = torch.logspace(-1, 2, 46)


@dataclass(frozen=True, eq=False)
class Domain:
    """Prototypes and scatter of a bundle's images.

    Attributes:
        prototypes: float16 [P, D]: centroids of the pooled activations of training images.
        scatter: float16 [D (D + 1) / 2]: lower triangle of their covariance around their centroids, row by row.
        samples: float16 [S, D]: pooled activations of held-out images, which calibrate confidence and distance.
    """

    layout: ClassVar[dict[str, str]] = {
        "prototypes": "float16 P D",
        "scatter": "float16 T",
        "samples": "float16 S D",
    }
    prototypes: Tensor
    scatter: Tensor
    samples: Tensor


@dataclass(frozen=True, eq=False)
class Domains:
    """The domains of B bundles that can be compared: one backbone, one stage, one preprocessing.

    Attributes:
        metric: float32 [D, D], inverse of the mean scatter. volume: log-determinant of the scatter.
        weight: float32 [B P, D], bias: float32 [B P, 1]: linear discriminants, one per prototype; a domain with fewer
            than P prototypes is padded with some that never win.
        center, spread: float32 [B]: median distance of a domain's own held-out images, and how far the 84th percentile
            (one standard deviation) is above it.
    """

    metric: Tensor
    volume: float
    weight: Tensor
    bias: Tensor
    center: Tensor
    spread: Tensor

    @classmethod
    def of(cls, domains: Sequence[Domain]) -> "Domains":
        """Stack the domains into one matrix."""
        metric, volume = _metric(domains)
        count = max(len(domain.prototypes) for domain in domains)
        prototypes = metric.new_zeros(len(domains), count, len(metric))
        bias = metric.new_full((len(domains), count), -torch.inf)
        for row, domain in enumerate(domains):
            points = domain.prototypes.float()
            prototypes[row, : len(points)] = points
            bias[row, : len(points)] = -0.5 * ((points @ metric) * points).sum(dim=1)
        weight = prototypes.flatten(0, 1) @ metric
        levels = torch.stack([_levels(domain, metric) for domain in domains])
        center, spread = levels[:, 0], (levels[:, 1] - levels[:, 0]).clamp(min=1e-3 * float(levels.abs().mean()))
        return cls(metric, volume, weight, bias.flatten()[:, None], center, spread)

    def scores(self, features: Tensor) -> Tensor:
        """Log-likelihoods [N, B] of pooled features [N, D] under each domain, up to a constant per image."""
        discriminants = torch.addmm(self.bias, self.weight, features.T)  # with images last, the maximum is vectorized
        return discriminants.unflatten(0, (len(self.center), -1)).amax(dim=1).T

    def distance(self, features: Tensor, scores: Tensor) -> Tensor:
        """Squared Mahalanobis distances to the nearest prototype, from features [N, D] and their scores [N, k]."""
        return ((features @ self.metric) * features).sum(dim=1, keepdim=True) - 2 * scores

    def likelihood(self, distance: Tensor) -> Tensor:
        """Log-likelihoods in nats, scaled to ``MAX_WIDTH`` dimensions, from squared distances of any shape.

        Unlike scores, they are comparable across groups of domains with different width, scatter and metric.
        """
        return -0.5 * (distance + self.volume) * (MAX_WIDTH / len(self.metric))

    def strangeness(self, distance: Tensor) -> Tensor:
        """How far [N, B] images are from each domain: 0 for its typical image, 1 for its 84th percentile."""
        return (distance - self.center) / self.spread


def _levels(domain: Domain, metric: Tensor) -> Tensor:
    """Median and 84th percentile, [2], of the squared distances of a domain's samples to their nearest prototypes."""
    gaps = domain.samples.float()[:, None] - domain.prototypes.float()
    distances = ((gaps @ metric) * gaps).sum(dim=2).amin(dim=1)
    return distances.quantile(distances.new_tensor([0.5, 0.84]))


def _metric(domains: Sequence[Domain]) -> tuple[Tensor, float]:
    """Inverse of the domains' mean scatter, float32 [D, D], and the scatter's log-determinant."""
    scatter = torch.stack([domain.scatter for domain in domains]).double().mean(dim=0)
    width = domains[0].prototypes.shape[1]
    rows, columns = torch.tril_indices(width, width, device=scatter.device)
    full = scatter.new_zeros(width, width)
    full[rows, columns] = full[columns, rows] = scatter
    full += SHRINKAGE * full.diagonal().mean().clamp(min=1e-6) * torch.eye(width, dtype=full.dtype, device=full.device)
    return torch.linalg.inv(full).float(), float(torch.logdet(full))


def pooled(x: Tensor) -> Tensor:
    """Pool activations between two stages, [N, C, H, W] or tokens [N, T, C], to float32 [N, D] of norm sqrt(C)."""
    mean = (x.mean(dim=(2, 3)) if x.dim() == 4 else x.mean(dim=1)).float()
    width = mean.shape[1]
    mean = normalize(mean) * width**0.5
    return mean if width <= MAX_WIDTH else mean @ _projection(width, mean.device)


def calibrated_temperature(scores: Tensor, owner: Tensor) -> float:
    """Temperature scaling (Guo et al. 2017): the maximum-likelihood temperature, by grid search.

    Args:
        scores: float32 [N, B].
        owner: the true domain, int64 [N].
    """
    losses = [cross_entropy(scores / temperature, owner) for temperature in TEMPERATURES]
    return float(TEMPERATURES[int(torch.stack(losses).argmin())])


@cache
def _projection(width: int, device: torch.device) -> Tensor:
    """Orthonormal columns [width, MAX_WIDTH], the same for every bundle."""
    generator = torch.Generator().manual_seed(0)
    columns = torch.linalg.qr(torch.randn(width, MAX_WIDTH, generator=generator)).Q * (width / MAX_WIDTH) ** 0.5
    return columns.to(device)
