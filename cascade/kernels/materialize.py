"""Materialize an adapter's weights in the model's own order, from its first stage to the end (paper §3, eq. 1-3).

A mask gives ``W * M / alpha``, a 1-bit delta ``W + s * delta``.
"""

import numpy as np
import torch
from torch import Tensor

from cascade.model.backbone import Backbone
from cascade.model.masks import Mask, alpha, count_active, split, unpack


def materialize(backbone: Backbone, mask: Mask, out: Tensor | None = None) -> Tensor:
    """Masked and scaled weights, float32 [n], from the mask's first stage to the end.

    Args:
        backbone: owns the pristine weights.
        mask: a mask or a 1-bit delta.
        out: a buffer to write into; allocated if None.
    """
    first = backbone.offset(mask.start)
    pristine = backbone.weights[first:]
    out = torch.empty_like(pristine) if out is None else out
    if pristine.device.type != "cpu" or mask.deltas:
        return materialize_plain(backbone, mask, out)
    from cascade.kernels import cpu  # importing numba takes a second

    bounds = np.array([s.offset - first for s in backbone.segments if s.offset >= first] + [len(pristine)])
    bits = mask.bits.numpy()
    alphas = np.sqrt(np.maximum(count_active(bits, bounds), 1) / np.diff(bounds))
    scales = np.repeat((1 / alphas).astype(np.float32)[:, None], cpu.LANES, axis=1)
    begin, end, segment = cut(bounds[:-1], bounds[1:])
    cpu.masked(bits, pristine.numpy(), begin, end, scales[segment], out.numpy())
    return out


def cut(begin: np.ndarray, end: np.ndarray, size: int = 1 << 16) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut ranges into pieces of at most ``size`` for threads to share: begin, end and range index of each piece."""
    pieces = -(-(end - begin) // size)
    which = np.repeat(np.arange(len(begin)), pieces)
    nth = np.arange(len(which)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = begin[which] + nth * size
    return starts, np.minimum(starts + size, end[which]), which


def materialize_plain(backbone: Backbone, mask: Mask, out: Tensor) -> Tensor:
    """``materialize`` in plain PyTorch: the reference for every kernel, on any device."""
    first = backbone.offset(mask.start)
    active = unpack(mask.bits, len(out))
    if mask.deltas:
        out.copy_(backbone.weights[first:])
        for name, delta in mask.deltas.items():
            span = slice(*(index - first for index in backbone.spans[name]))
            sign = torch.where(active[span].view(len(delta), -1), 1.0, -1.0)
            out[span] += (sign * delta.to(out)[:, None]).flatten()
        return out
    torch.mul(backbone.weights[first:], active, out=out)
    for segment, part in split(backbone, mask.start, active):
        out[segment.offset - first : segment.end - first] /= alpha(part)
    return out
