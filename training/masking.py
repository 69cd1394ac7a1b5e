"""Learning a mask: scores beside frozen weights, a hard threshold forward, straight through backward.

``M = 1[S > mu]`` (strict), forward weight ``W * M / alpha`` with ``alpha = sqrt(mean(M))`` recomputed at
each forward, ``dL/dS := dL/dM`` without clipping, and the gradient flows through alpha, too (paper
§3.1, eq. 1-4; method.md §1). PyTorch's own parametrizations put the scores beside any timm model's weights.
"""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from cascade import masks
from cascade.backbone import Backbone, Segment
from cascade.masks import Mask
from cascade.stages import Stage, stage_of, stages


class _Threshold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, threshold: float) -> Tensor:
        return (scores > threshold).to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class ThresholdMask(nn.Module):
    """The parametrization of one weight (or, fused, of ``rows`` row blocks with an alpha each)."""

    def __init__(self, weight: Tensor, rows: int, initial: float, threshold: float) -> None:
        super().__init__()
        self.rows, self.threshold = rows, threshold
        self.scores = nn.Parameter(torch.full_like(weight, initial))

    def forward(self, weight: Tensor) -> Tensor:
        mask: Tensor = _Threshold.apply(self.scores, self.threshold)
        blocks = mask.view(self.rows, -1)
        alpha = blocks.mean(dim=1, keepdim=True).clamp(min=1 / blocks.shape[1]).sqrt()
        return weight * (blocks / alpha).view_as(weight)


@dataclass
class MaskedModel:
    """A copy of a backbone with trainable scores from stage ``start`` on; everything before is frozen.

    Attributes:
        backbone: the pristine one it was made from.
        model: the copy.
        start: first stage with scores.
        train_norms: whether BatchNorms from ``start`` on run in train mode.
    """

    backbone: Backbone
    model: nn.Module
    row: list[Stage]
    start: int
    train_norms: bool

    @property
    def scores(self) -> dict[str, nn.Parameter]:
        """Score tensors by the name of the parameter that they mask, in the order of the flat buffer."""
        names = dict.fromkeys(s.parameter for s in self.backbone.segments if s.stage >= self.start)
        return {name: self._parametrization(name).scores for name in names}

    @property
    def norms(self) -> dict[str, Tensor]:
        """BatchNorm running statistics from ``start`` on, by buffer name."""
        buffers = dict(self.model.named_buffers())
        return {n: buffers[n] for n in self.backbone.norms if stage_of(n, self.row) >= self.start}

    def train(self) -> None:
        """Modes for a training step: everything in eval, save the BatchNorms that may adapt."""
        self.model.eval()
        if self.train_norms:
            for name, module in self.model.named_modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm) and stage_of(name, self.row) >= self.start:
                    module.train()

    def trunk(self, x: Tensor) -> Tensor:
        """The frozen stages before ``start``, without autograd."""
        with torch.no_grad():
            x = x.contiguous(memory_format=torch.channels_last)  # twice as fast on a CPU
            for stage in self.row[: self.start]:
                x = stage.run(x)
        return x

    def tail(self, x: Tensor) -> Tensor:
        """The masked stages and the pooling: features [B, F]."""
        x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
        for stage in self.row[self.start :]:
            x = stage.run(x)
        return self.model.forward_head(x, pre_logits=True)  # type: ignore[operator]

    def sparse(self, below: float) -> Iterator[tuple[str, float]]:
        """Parameters of which less than ``below`` is active, with the share."""
        for name, scores in self.scores.items():
            share = float((scores > self._parametrization(name).threshold).float().mean())
            if share < below:
                yield name, share

    def load(self, scores: Mapping[str, Tensor], norms: Mapping[str, Tensor]) -> None:
        """Take over scores and statistics by name; names that are not masked here are passed over."""
        with torch.no_grad():
            for name, parameter in self.scores.items():
                parameter.copy_(scores[name])
            for name, buffer in self.norms.items():
                buffer.copy_(norms.get(name, self.backbone.norms[name]))

    def _parametrization(self, name: str) -> ThresholdMask:
        path, _, kind = name.rpartition(".")
        found = self.model.get_submodule(path).parametrizations[kind][0]  # type: ignore[index]
        assert isinstance(found, ThresholdMask)
        return found


def mask_backbone(
    backbone: Backbone,
    start: int,
    *,
    initial: float = 1.0,
    threshold: float = 0.0,
    train_norms: bool = False,
    below: Mask | None = None,
) -> MaskedModel:
    """A trainable copy of ``backbone`` with scores on every maskable weight from stage ``start`` on.

    Args:
        initial, threshold: S0 and mu. By Theorems 1 and 2 only their relation to the learning rate counts.
        below: the mask whose weights and statistics the frozen stages before ``start`` have.
    """
    model = deepcopy(backbone.model)
    _write(backbone, model, backbone.flat, 0, backbone.norms)  # the copy may have come with an executor's mask
    if below is not None:
        first, stop = backbone.offset(below.start), backbone.offset(start)
        _write(backbone, model, masks.apply(backbone, below)[: max(0, stop - first)], first, below.norms)
    row = stages(model)
    rows = _row_blocks([s for s in backbone.segments if s.stage >= start])
    for name, count in rows.items():
        path, _, kind = name.rpartition(".")
        module = model.get_submodule(path)
        weight = getattr(module, kind)
        mask = ThresholdMask(weight.detach(), count, initial, threshold)
        parametrize.register_parametrization(module, kind, mask, unsafe=True)
    return MaskedModel(backbone, model, row, start, train_norms)


def to_mask(
    name: str,
    backbone: Backbone,
    start: int,
    scores: Mapping[str, Tensor],
    norms: Mapping[str, Tensor],
    threshold: float = 0.0,
) -> Mask:
    """Scores (by parameter) and statistics (by buffer) as a packed mask; only statistics that moved go along."""
    names = dict.fromkeys(s.parameter for s in backbone.segments if s.stage >= start)
    rows = [(scores[n] > threshold).flatten() for n in names]
    bits = masks.pack(torch.cat(rows)) if rows else torch.zeros(0, dtype=torch.uint8)
    moved = {n: t.detach().clone().cpu() for n, t in norms.items() if not torch.equal(t, backbone.norms[n])}
    return Mask(name, start, bits.cpu(), moved)


def _write(backbone: Backbone, model: nn.Module, flat: Tensor, first: int, norms: Mapping[str, Tensor]) -> None:
    """Write maskable weights, a flat tensor that begins at offset ``first``, and statistics into ``model``."""
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    begin: dict[str, int] = {}
    for segment in backbone.segments:
        begin.setdefault(segment.parameter, segment.offset - first)
    for name, offset in begin.items():
        parameter = parameters[name]
        if 0 <= offset < len(flat):
            parameter.data = flat[offset : offset + parameter.numel()].view_as(parameter).clone()
    for name, tensor in norms.items():
        buffers[name].copy_(tensor)


def _row_blocks(segments: list[Segment]) -> dict[str, int]:
    rows: dict[str, int] = {}
    for segment in segments:
        rows[segment.parameter] = rows.get(segment.parameter, 0) + 1
    return rows
