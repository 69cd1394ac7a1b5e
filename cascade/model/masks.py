"""Masks: one bit a weight, one alpha a tensor (paper §3, eq. 1-3; method.md §1).

The weight that a mask makes of ``W`` is ``W * M / alpha`` with ``alpha = sqrt(mean(M))``, which keeps
the variance of the layer's output. Bits are packed eight to a byte, the first weight in the lowest
bit, over the backbone's flat buffer from the mask's first stage to the end.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cascade.model.backbone import Backbone, Segment

_SHIFTS = torch.arange(8, dtype=torch.uint8)


@dataclass(frozen=True, eq=False)
class Mask:
    """One adapted model, as far as it differs from the backbone.

    Attributes:
        name: ``dispatcher`` or ``expert-3``.
        start: first stage that it covers; earlier weights are not its own.
        bits: packed bits, uint8 [ceil(n / 8)], n weights from stage ``start`` to the end.
        norms: BatchNorm running statistics that differ from the backbone's, by buffer name.
    """

    name: str
    start: int
    bits: Tensor
    norms: dict[str, Tensor] = field(default_factory=dict)

    def bytes(self) -> int:
        """Resident memory of the packed mask."""
        return self.bits.nbytes + sum(t.nbytes for t in self.norms.values())


def pack(active: Tensor) -> Tensor:
    """Bits of a bool tensor [n] as uint8 [ceil(n / 8)]; unused bits of the last byte are 0."""
    padded = torch.nn.functional.pad(active.to(torch.uint8).flatten(), (0, -active.numel() % 8))
    return (padded.view(-1, 8) << _SHIFTS.to(active.device)).sum(dim=1, dtype=torch.uint8)


def unpack(bits: Tensor, n: int) -> Tensor:
    """The first ``n`` bits of uint8 [ceil(n / 8)] as bool [n]."""
    return ((bits[:, None] >> _SHIFTS.to(bits.device)) & 1).flatten()[:n].bool()


def alpha(active: Tensor) -> float:
    """``sqrt(mean(M))`` of one tensor's mask, with a floor of one active weight."""
    return float(max(int(active.sum()), 1) / active.numel()) ** 0.5


def split(backbone: Backbone, start: int, flat: Tensor) -> Iterator[tuple[Segment, Tensor]]:
    """A flat tensor that begins at stage ``start``, cut into the backbone's segments (views)."""
    first = backbone.offset(start)
    for segment in backbone.segments:
        if segment.offset >= first:
            yield segment, flat[segment.offset - first : segment.end - first]


def density(backbone: Backbone, mask: Mask) -> float:
    """Share of active weights among those that the mask covers."""
    n = backbone.weights.numel() - backbone.offset(mask.start)
    return float(unpack(mask.bits, n).float().mean()) if n else 1.0


def difference(a: Mask, b: Mask, backbone: Backbone) -> float:
    """Share of bits in which two masks differ, over the stages that both cover."""
    start = max(a.start, b.start)
    n = backbone.weights.numel() - backbone.offset(start)
    tails = [unpack(m.bits, backbone.weights.numel() - backbone.offset(m.start))[-n:] for m in (a, b)]
    return float((tails[0] != tails[1]).float().mean()) if n else 0.0
