"""What a bundle keeps so that its head can learn new classes without training: class means and one shared covariance.

A linear head follows from them in closed form (linear discriminant analysis, ridge-regularized; Hastie et al., *The
Elements of Statistical Learning*, section 4.3). Further images change the sums and nothing else, so a class can come or
go in seconds, and without the images of the other classes.
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
        ridge: float32 [1], what is added to the diagonal of the correlations. temperature: float32 [1], what the logits
            are divided by. Both were chosen on validation images.
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
        """From features float32 [N, dim] and labels int64 [N]."""
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
        """With further images: features float32 [N, dim], labels int64 [N] below ``classes``; old classes come first.

        The statistics are those of all images together, up to the rounding of the stored ones.
        """
        new = type(self).of(features, labels, classes)
        counts, means = new.counts.clone(), new.means.double()
        old = torch.zeros_like(counts)
        old[: len(self.counts)] = self.counts
        before = torch.zeros_like(means)
        before[: len(self.means)] = self.means.double()
        total = (counts + old).clamp(min=1)
        gap = (means - before) * (counts * old / total).sqrt()[:, None]  # zero where a class is on one side only
        scatter = self._scatter() + new._scatter() + gap.T @ gap
        together = (means * counts[:, None] + before * old[:, None]) / total[:, None]
        return self._of(together, counts + old, scatter, self.ridge, self.temperature)

    def keep(self, classes: list[int]) -> Self:
        """With these classes only. The covariance stays as it is: that of the others is as good an estimate."""
        return replace(self, means=self.means[classes], counts=self.counts[classes])

    def head(self) -> Linear:
        """The classifier, every class taken to be as likely as any other; its logits are calibrated."""
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
        bias = torch.where(seen, bias / temperature, bias.new_tensor(-1e9))  # a class without images is never an answer
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
