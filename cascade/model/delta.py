"""Compress a fine-tuned copy of a backbone to a 1-bit delta: signs, and one number per output channel.

``W + s * delta``, where s is the sign of the difference and delta its mean absolute value in each output channel, which
minimizes the squared error (BitDelta, arXiv 2402.10193; T-Switch, arXiv 2412.00054). One-dimensional parameters and
BatchNorm statistics are taken from the copy unchanged.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cascade.model.backbone import Backbone
from cascade.model.masks import Mask, pack
from cascade.model.stages import stage_of


@dataclass(frozen=True)
class Loss:
    """How much of a weight's change the delta loses.

    Attributes:
        weight: its name.
        change: |difference| / |backbone's weight|, Frobenius norms.
        lost: share of the squared difference that the delta does not reproduce; 1 if it is dropped entirely.
    """

    weight: str
    change: float
    lost: float


def compress(backbone: Backbone, tuned: Mapping[str, Tensor], name: str = "dispatcher") -> tuple[Mask, list[Loss]]:
    """Compress a fine-tuned state dict (the backbone's names and shapes) to a delta, and measure each weight's loss.

    The delta starts at the first stage that the copy changed.
    """
    pristine = {n: t for n, t in backbone.model.state_dict().items() if not n.endswith("num_batches_tracked")}
    differences = {n: tuned[n].to(t) - t for n, t in pristine.items()}
    changed = [n for n, d in differences.items() if d.any()]
    start = min((stage_of(n, backbone.stages) for n in changed), default=len(backbone.stages))
    rows, channels = backbone.rows(start), backbone.channels(start)
    first = backbone.offset(start)
    positive = torch.ones(backbone.weights.numel() - first, dtype=torch.bool)
    deltas, losses = {}, []
    for weight, count in rows.items():
        difference = differences[weight].reshape(count, -1)
        begin, end = (index - first for index in backbone.spans[weight])
        positive[begin:end] = difference.flatten() >= 0
        delta = difference.abs().mean(dim=1).half()
        deltas[weight] = delta.cpu()
        approximation = torch.where(difference >= 0, 1.0, -1.0) * delta.float()[:, None]
        losses.append(_loss(weight, pristine[weight], difference, difference - approximation))
    for weight in changed:
        if weight not in rows and weight not in channels and weight not in backbone.norms:
            losses.append(_loss(weight, pristine[weight], differences[weight], differences[weight]))
    norms = {n: tuned[n].to(backbone.norms[n]).cpu() for n in changed if n in backbone.norms}
    trained = {n: tuned[n].half().cpu() for n in changed if n in channels}
    return Mask(name, start, pack(positive), norms, trained, deltas), losses


def _loss(weight: str, pristine: Tensor, difference: Tensor, rest: Tensor) -> Loss:
    size = float(difference.norm())
    change = size / max(float(pristine.norm()), 1e-12)
    return Loss(weight, change, float(rest.square().sum()) / size**2 if size else 0.0)
