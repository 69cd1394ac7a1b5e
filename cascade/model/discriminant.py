"""Class means and one shared covariance, from which a head learns new classes without training.

A linear head follows from them in closed form (linear discriminant analysis, ridge-regularized; Hastie et al., *The
Elements of Statistical Learning*, section 4.3). New images only change the sums, so a class can be added or removed in
seconds, without the images of the other classes.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from cascade.model.heads import Linear


@dataclass(frozen=True, eq=False)
class Discriminant:
    """Statistics of features [N, dim] by class.

    Attributes:
        means: float32 [classes, dim]. counts: int64 [classes], images of each class.
        deviation: float32 [dim], standard deviation within the classes.
        correlation: float16 [dim (dim + 1) / 2]: lower triangle of the correlations within the classes, row by row.
        ridge: float32 [1], added to the diagonal of the correlations. temperature: float32 [1], divides the logits.
            Both were chosen on validation images.
    """

    layout: ClassVar[dict[str, str]] = {
        "means": "float32 classes dim",
        "counts": "int64 classes",
        "deviation": "float32 dim",
        "correlation": "float16 T",
        "ridge": "float32 1",
        "temperature": "float32 1",
    }
    means: Tensor
    counts: Tensor
    deviation: Tensor
    correlation: Tensor
    ridge: Tensor
    temperature: Tensor

    @classmethod
    def of(cls, features: Tensor, labels: Tensor, classes: int, ridge: float = 0.1, temperature: float = 1.0) -> Self:
        """Compute the statistics of features float32 [N, dim] with labels int64 [N]."""
        x = features.double()
        counts = torch.bincount(labels, minlength=classes)
        means = x.new_zeros(classes, x.shape[1]).index_add_(0, labels, x) / counts.clamp(min=1)[:, None]
        within = x - means[labels]
        return cls._of(means, counts, within.T @ within, torch.tensor([ridge]), torch.tensor([temperature]))

    @classmethod
    def _of(cls, means: Tensor, counts: Tensor, scatter: Tensor, ridge: Tensor, temperature: Tensor) -> Self:
        covariance = scatter / counts.sum().clamp(min=1)
        deviation = covariance.diagonal().clamp(min=1e-12).sqrt()
        correlation = covariance / deviation / deviation[:, None]
        rows, columns = torch.tril_indices(*correlation.shape)
        return cls(means.float(), counts, deviation.float(), correlation[rows, columns].half(), ridge, temperature)

    def add(self, features: Tensor, labels: Tensor, classes: int) -> Self:
        """Add images: features float32 [N, dim], labels int64 [N] below ``classes``; existing classes come first.

        The result equals the statistics of all images together, up to the rounding of the stored ones.
        """
        new = type(self).of(features, labels, classes)
        counts, means = new.counts.clone(), new.means.double()
        old = torch.zeros_like(counts)
        old[: len(self.counts)] = self.counts
        before = torch.zeros_like(means)
        before[: len(self.means)] = self.means.double()
        total = (counts + old).clamp(min=1)
        gap = (means - before) * (counts * old / total).sqrt()[:, None]  # zero for a class that only one of them has
        scatter = self._scatter() + new._scatter() + gap.T @ gap
        merged = (means * counts[:, None] + before * old[:, None]) / total[:, None]
        return self._of(merged, counts + old, scatter, self.ridge, self.temperature)

    def keep(self, classes: list[int]) -> Self:
        """Keep these classes only. The covariance does not change: the dropped classes still help to estimate it."""
        return replace(self, means=self.means[classes], counts=self.counts[classes])

    def head(self) -> Linear:
        """The classifier for uniform class priors; its logits are calibrated."""
        correlation = self._correlation()
        correlation += float(self.ridge) * torch.eye(len(correlation), dtype=correlation.dtype)
        deviation = self.deviation.double()
        seen = self.counts > 0
        center = self.means[seen].double().mean(dim=0)
        means = (self.means.double() - center) / deviation
        weight = torch.linalg.solve(correlation, means.T).T
        bias = -0.5 * (weight * means).sum(dim=1)
        weight = weight / deviation
        bias = bias - weight @ center
        temperature = float(self.temperature)
        bias = torch.where(seen, bias / temperature, bias.new_tensor(-1e9))  # a class without images is never predicted
        return Linear((weight / temperature * seen[:, None]).float(), bias.float())

    def _correlation(self) -> Tensor:
        size = len(self.deviation)
        rows, columns = torch.tril_indices(size, size)
        full = torch.zeros(size, size, dtype=torch.float64)
        full[rows, columns] = full[columns, rows] = self.correlation.double()
        return full

    def _scatter(self) -> Tensor:
        deviation = self.deviation.double()
        return self._correlation() * deviation * deviation[:, None] * self.counts.sum()
