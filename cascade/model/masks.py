"""Adapters: one bit per weight, and trained values per channel (paper §3, eq. 1-3; method.md §1).

A mask turns a weight ``W`` into ``W * M / alpha`` with ``alpha = sqrt(mean(M))``, one alpha per tensor, which preserves
the variance of the layer's output. Bits are packed eight to a byte, the first weight in the lowest bit, over the
backbone's flat buffer from the mask's first stage to the end.

A *1-bit delta* reads the same bits as signs: ``W + s * delta`` with s = 1 or -1 for each weight and one delta per
output channel. It is a compressed fine-tuned copy (BitDelta, arXiv 2402.10193).

Besides its bits, a mask or delta may carry trained *channels*: BatchNorm and LayerNorm scales and shifts, and biases.
They fold into the scale and shift that each output channel has anyway, so they cost no extra work in a pass.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from cascade.model.backbone import Backbone, Segment

_SHIFTS = torch.arange(8, dtype=torch.uint8)


@dataclass(frozen=True, eq=False)
class Mask:
    """How one adapted model differs from the backbone.

    Attributes:
        name: ``dispatcher`` or ``expert-3``.
        start: first stage that it adapts. If it equals the number of stages, the mask changes nothing ("frozen").
        bits: packed bits, uint8 [ceil(n / 8)], for the n maskable weights from stage ``start`` to the end.
        norms: BatchNorm running statistics that differ from the backbone's, by buffer name.
        channels: trained values of one-dimensional parameters (see ``Backbone.channels``) from stage ``start`` on,
            float16, by parameter name. Each replaces the parameter: no bits apply to it.
        deltas: for a 1-bit delta, the delta of each output channel, float16 [rows], by weight name. Empty for a mask.
            Maskable parameters without an entry keep the backbone's values, or those of ``channels``.
    """

    name: str
    start: int
    bits: Tensor
    norms: dict[str, Tensor] = field(default_factory=dict)
    channels: dict[str, Tensor] = field(default_factory=dict)
    deltas: dict[str, Tensor] = field(default_factory=dict)

    def bytes(self) -> int:
        """Resident memory of the packed mask."""
        small = (*self.norms.values(), *self.channels.values(), *self.deltas.values())
        return self.bits.nbytes + sum(t.nbytes for t in small)


def pack(active: Tensor) -> Tensor:
    """Pack a bool tensor [n] into uint8 [ceil(n / 8)]; unused bits of the last byte are 0."""
    padded = torch.nn.functional.pad(active.to(torch.uint8).flatten(), (0, -active.numel() % 8))
    return (padded.view(-1, 8) << _SHIFTS.to(active.device)).sum(dim=1, dtype=torch.uint8)


def unpack(bits: Tensor, n: int) -> Tensor:
    """Unpack the first ``n`` bits of uint8 [ceil(n / 8)] into bool [n]."""
    return ((bits[:, None] >> _SHIFTS.to(bits.device)) & 1).flatten()[:n].bool()


def all_ones(n: int) -> Tensor:
    """Packed bits of a mask that keeps all ``n`` weights."""
    bits = torch.full((-(-n // 8),), 255, dtype=torch.uint8)
    if n % 8:
        bits[-1] = (1 << n % 8) - 1
    return bits


def frozen(backbone: Backbone) -> Mask:
    """A dispatcher that does not change the backbone."""
    return Mask("dispatcher", len(backbone.stages), all_ones(0))


def count_active(bits: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """The number of set bits in each segment, int64 [segments].

    Args:
        bits: packed bits, uint8.
        bounds: where each segment begins, and the end of the last one, int64 [segments + 1].
    """
    ones = np.bitwise_count(bits)
    whole = np.array([ones[a:b].sum() for a, b in pairwise((bounds >> 3).tolist())], dtype=np.int64)
    padded = np.append(bits, np.uint8(0))  # a bound may be at the very end
    partial = np.bitwise_count(padded[bounds >> 3] & ((1 << (bounds & 7)) - 1)).astype(np.int64)
    return np.asarray(whole + np.diff(partial))


def alpha(active: Tensor) -> float:
    """``sqrt(mean(M))`` of one tensor's mask, counting at least one active weight."""
    return float(max(int(active.sum()), 1) / active.numel()) ** 0.5


def split(backbone: Backbone, start: int, flat: Tensor) -> Iterator[tuple[Segment, Tensor]]:
    """Split a flat tensor that begins at stage ``start`` into views of the backbone's segments."""
    first = backbone.offset(start)
    for segment in backbone.segments:
        if segment.offset >= first:
            yield segment, flat[segment.offset - first : segment.end - first]


def density(backbone: Backbone, mask: Mask) -> float:
    """Share of active weights among those that the mask covers; all of them in a delta, whose bits are signs."""
    if mask.deltas:
        return 1.0
    n = backbone.weights.numel() - backbone.offset(mask.start)
    return float(unpack(mask.bits, n).float().mean()) if n else 1.0


def difference(a: Mask, b: Mask, backbone: Backbone) -> float:
    """Share of bits in which two masks differ, over the stages that both cover."""
    start = max(a.start, b.start)
    n = backbone.weights.numel() - backbone.offset(start)
    tails = [unpack(m.bits, backbone.weights.numel() - backbone.offset(m.start))[-n:] for m in (a, b)]
    return float((tails[0] != tails[1]).float().mean()) if n else 0.0
