"""Heads on the fused embedding: a linear layer for labels, a bank of images for neighbors (method.md §4)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from cascade.extras import library


@dataclass(frozen=True, eq=False)
class Linear:
    """A linear classifier: multinomial logistic regression, or the head of a supervised mask.

    Attributes:
        weight: float32 or float16 [classes, dim]; bias: float32 [classes].
    """

    layout: ClassVar[dict[str, str]] = {"weight": "float32/float16 classes dim", "bias": "float32 classes"}
    weight: Tensor
    bias: Tensor

    def logits(self, embeddings: Tensor) -> Tensor:
        """Embeddings [B, dim] to logits [B, classes]."""
        return torch.nn.functional.linear(embeddings, self.weight.float(), self.bias)

    def scores(self, embeddings: Tensor) -> Tensor:
        """Embeddings [B, dim] to class probabilities [B, classes]."""
        return self.logits(embeddings).softmax(dim=1)


@dataclass(frozen=True, eq=False)
class Bank:
    """Embeddings of training images, searched for neighbors.

    Attributes:
        embeddings: float16 [rows, dim], L2-normalized.
        names: the images' names, ``rows`` of them.
        labels: their classes; empty without labels.
    """

    layout: ClassVar[dict[str, str]] = {"embeddings": "float16 rows dim"}
    embeddings: Tensor
    names: tuple[str, ...]
    labels: tuple[str, ...] = field(default=())

    def take(self, rows: Sequence[int]) -> "Bank":
        """The bank of these rows only."""
        names, labels = ([column[i] for i in rows] if column else [] for column in (self.names, self.labels))
        return Bank(self.embeddings[rows], tuple(names), tuple(labels))

    def bytes(self) -> int:
        """Resident memory: the float16 rows, and the float32 copy in FAISS."""
        return self.embeddings.nbytes + 4 * self.embeddings.numel()

    @cached_property
    def index(self) -> Any:
        """FAISS inner-product index over the rows (exact)."""
        index = faiss().IndexFlatIP(self.embeddings.shape[1])
        index.add(self.embeddings.float().cpu().numpy())
        return index

    def nearest(self, embeddings: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Cosine similarities float32 [B, k], descending, and rows int64 [B, k] of the k nearest images."""
        queries = normalize(embeddings.float()).cpu().numpy()
        similarities, rows = self.index.search(queries, min(k, len(self.names)))
        return similarities, rows


def faiss() -> Any:
    """The FAISS module. Raises ExtraError if it is not installed."""
    return library("faiss")
