"""The HTML pages, and the two-dimensional map of a bundle's neighbor bank that one of them draws."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from cascade.model.heads import Bank

HERE = Path(__file__).parent
POLICY = (  # pages load nothing from other sites and send nothing to them
    "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'unsafe-inline'; img-src blob:;"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
_maps: "WeakKeyDictionary[Bank, Map]" = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Map:
    """The first two principal components of a bank, as plain numbers.

    Attributes:
        mean: [dim]; axes: [2, dim]. The point of an L2-normalized embedding e is axes @ (e - mean).
        points: [rows, 2].
    """

    mean: list[float]
    axes: list[list[float]]
    points: list[list[float]]


@cache
def page(name: str) -> str:
    """One of the HTML and JavaScript files beside this module."""
    return HERE.joinpath(name).read_text()


def bank_map(bank: Bank) -> dict[str, Any]:
    """The map of a bank, with the names and labels of its images; computed once, which takes milliseconds."""
    if (pca := _maps.get(bank)) is None:
        pca = _maps[bank] = _pca(bank.embeddings.float())
    return {
        "mean": pca.mean,
        "axes": pca.axes,
        "points": pca.points,
        "names": list(bank.names),
        "labels": list(bank.labels),
    }


def _pca(embeddings: Tensor) -> Map:
    mean = embeddings.mean(0)
    _, _, axes = torch.linalg.svd(embeddings - mean, full_matrices=False)
    axes = torch.nn.functional.pad(axes[:2], (0, 0, 0, max(0, 2 - len(axes))))
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    axes = axes * torch.where(largest < 0, -1, 1)  # the sign of a component is arbitrary: keep it stable
    return Map(mean.tolist(), axes.tolist(), ((embeddings - mean) @ axes.T).tolist())
