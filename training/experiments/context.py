"""Mask bits by an entropy coder that knows where they lie: the context coder of the compression experiment.

Every weight has a context that the receiver knows, too: how dense its tensor or output channel is (a byte each goes
along), to which quantile of its tensor |W| belongs, and for an expert the dispatcher's bit. Bits of one context are
one Bernoulli source, whose p goes along in 16 bits; constriction's range coder (ANS) does the rest.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cascade.backbone import Backbone
from cascade.errors import CascadeError

LEVELS = 32  # of the density of tensors and channels
FEWEST = 256  # weights that a byte of density is spent on; smaller channels share one
WAYS: Mapping[str, Mapping[str, Any]] = {
    "tensor": {"channels": False, "quantiles": 1},
    "channel": {"channels": True, "quantiles": 1},
    "channel and |W|": {"channels": True, "quantiles": 16},
}


@dataclass(frozen=True)
class Layout:
    """What sender and receiver know of each weight.

    Attributes:
        group: its tensor or output channel, int32 [n], numbered from 0.
        quantile: of |W| in its tensor, uint8 [n], below ``quantiles``.
    """

    group: np.ndarray
    quantile: np.ndarray
    quantiles: int

    @classmethod
    def of(cls, backbone: Backbone, start: int, *, channels: bool, quantiles: int) -> "Layout":
        """Of the weights from stage ``start`` on."""
        shapes = {n: p.shape for n, p in backbone.model.named_parameters()}
        groups, found, count = [], [], 0
        for segment in backbone.segments:
            if segment.stage < start:
                continue
            shape = shapes[segment.parameter]
            row = int(np.prod(shape[1:]))
            size = row * -(-FEWEST // row) if channels and len(shape) > 1 else segment.size
            groups.append(count + np.arange(segment.size, dtype=np.int32) // size)
            count = int(groups[-1][-1]) + 1
            weight = backbone.flat[segment.offset : segment.end].abs().cpu().numpy()
            edges = np.quantile(weight, np.arange(1, quantiles) / quantiles)
            found.append(np.searchsorted(edges, weight).astype(np.uint8))
        return cls(np.concatenate(groups), np.concatenate(found), quantiles)

    def cells(self, level: np.ndarray, known: Tensor | None) -> np.ndarray:
        """The context of each weight, int32 [n], from the density level of its group."""
        cell = level[self.group].astype(np.int32) * self.quantiles + self.quantile
        return cell if known is None else 2 * cell + known.numpy()

    def count(self, known: Tensor | None) -> int:
        return LEVELS * self.quantiles * (1 if known is None else 2)


def encode(bits: Tensor, layout: Layout, known: Tensor | None = None) -> bytes:
    """Bool [n] as bytes: levels of the groups, p of the contexts, coded bits.

    Args:
        known: bits that the receiver has already, bool [n]: the dispatcher's, where an expert is sent.
    """
    active = bits.numpy()
    density = np.bincount(layout.group, active) / np.bincount(layout.group)
    level = np.searchsorted(np.quantile(density, np.arange(1, LEVELS) / LEVELS), density).astype(np.uint8)
    cell = layout.cells(level, known)
    size = np.bincount(cell, minlength=layout.count(known))
    share = np.bincount(cell, active, minlength=len(size)) / np.maximum(size, 1)
    p = np.clip(np.round(share * 65535), 1, 65534).astype("<u2")
    ordered = active[np.argsort(cell, kind="stable")].astype(np.int32)
    ends = np.cumsum(size)
    stream = _stream()
    coder = stream.stack.AnsCoder()
    for k in np.flatnonzero(size)[::-1]:  # a stack: what is decoded first goes in last
        coder.encode_reverse(ordered[ends[k] - size[k] : ends[k]], _bernoulli(stream, p[k]))
    return level.tobytes() + p.tobytes() + coder.get_compressed().astype("<u4").tobytes()


def decode(data: bytes, layout: Layout, known: Tensor | None = None) -> Tensor:
    """The inverse of :func:`encode`: bool [n]."""
    groups, contexts = int(layout.group[-1]) + 1, layout.count(known)
    level = np.frombuffer(data, np.uint8, groups)
    p = np.frombuffer(data, "<u2", contexts, groups)
    words = np.frombuffer(data, "<u4", offset=groups + 2 * contexts).astype(np.uint32)
    cell = layout.cells(level, known)
    size = np.bincount(cell, minlength=contexts)
    stream = _stream()
    coder = stream.stack.AnsCoder(words)
    parts = [coder.decode(_bernoulli(stream, p[k]), int(size[k])) for k in np.flatnonzero(size)]
    bits = np.empty(len(cell), np.bool_)
    bits[np.argsort(cell, kind="stable")] = np.concatenate(parts)
    return torch.from_numpy(bits)


def _bernoulli(stream: Any, p: np.uint16) -> Any:
    return stream.model.Bernoulli(float(p) / 65535, perfect=False)


def _stream() -> Any:
    try:
        from constriction import stream  # type: ignore[import-untyped]
    except ImportError as error:
        raise CascadeError("the context coder needs constriction: pip install 'cascade-vision[paper]'") from error
    return stream
