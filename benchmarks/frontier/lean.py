"""The masked tail of an EfficientNet on stored features, twice as fast as ``training.masking`` on a CPU.

Maps of 2 x 2 or 4 x 4 are so small that a convolution is a matrix product (bfloat16 where the processor multiplies it)
or, by channel, a few multiplications a position. Masks, losses and gradients are the trainer's, to the rounding of the
products.
"""

from collections.abc import Mapping
from functools import cache
from math import isqrt
from typing import Any

import torch
from timm.layers import Conv2dSame
from timm.models import EfficientNet
from timm.models._efficientnet_blocks import InvertedResidual
from torch import Tensor, nn
from torch.nn.functional import linear

from cascade.model.backbone import Backbone


class _Masked(torch.autograd.Function):
    """``W * M / alpha`` with the straight-through gradient, also through alpha (method.md §1)."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, weight: Tensor) -> Tensor:
        mask = (scores > 0).to(weight.dtype)
        alpha = mask.mean().clamp(min=1 / mask.numel()).sqrt()
        ctx.save_for_backward(mask, weight, alpha)
        return weight * mask / alpha

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        mask, weight, alpha = ctx.saved_tensors
        g = gradients[0] * weight
        return g / alpha - (g * mask).sum() / (2 * alpha**3 * mask.numel()), None


class _Depthwise(torch.autograd.Function):
    """x [Q, B, C] under taps [P, Q, C]: ``y[p] = sum over q of x[q] * taps[p, q]``, of the pairs ``seen`` [P, Q]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: Tensor, seen: Tensor) -> Tensor:
        ctx.save_for_backward(x, taps)
        ctx.pairs = seen.nonzero().tolist()
        y = x.new_zeros(len(taps), *x.shape[1:])
        for p, q in ctx.pairs:
            y[p].addcmul_(x[q], taps[p, q])
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (x, taps), g = ctx.saved_tensors, gradients[0]
        gx, gt = torch.zeros_like(x), torch.zeros_like(taps)
        for p, q in ctx.pairs:
            gx[q].addcmul_(g[p], taps[p, q])
            gt[p, q] = (g[p] * x[q]).sum(dim=0)
        return gx, gt, None


class Tail:
    """Scores on a backbone's last stages, and the pass through them."""

    def __init__(self, backbone: Backbone, start: int) -> None:
        model = backbone.model
        assert isinstance(model, EfficientNet)
        blocks: list[Any] = [b for s in backbone.row[start:-1] for b in model.get_submodule(s.name).children()]
        assert all(type(b) is InvertedResidual for b in blocks), "only such blocks"
        self.blocks = blocks
        names = {id(p): n for n, p in model.named_parameters()}
        self.weights: dict[str, Tensor] = {}  # BatchNorm's scale folded in: one alpha a tensor goes through it
        self.shifts: dict[str, Tensor] = {}
        self._of: dict[int, str] = {}
        pairs = [p for b in blocks for p in ((b.conv_pw, b.bn1), (b.conv_dw, b.bn2), (b.conv_pwl, b.bn3))]
        for conv, norm in [*pairs, (model.conv_head, model.bn2)]:
            name = self._of[id(conv)] = names[id(conv.weight)]
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            self.weights[name] = (conv.weight * scale[:, None, None, None]).detach().clone()
            self.shifts[name] = (norm.bias - norm.running_mean * scale).detach().clone()
        self.head = self._of[id(model.conv_head)]
        self.act = model.bn2.act
        self.scores = {n: nn.Parameter(torch.ones_like(w)) for n, w in self.weights.items()}
        self.precise = False

    @property
    def width(self) -> int:
        """Of the features."""
        return self.weights[self.head].shape[0]

    def load(self, scores: Mapping[str, Tensor]) -> None:
        """Take over scores by name."""
        with torch.no_grad():
            for name, parameter in self.scores.items():
                parameter.copy_(scores[name])

    def state(self) -> dict[str, Tensor]:
        """A copy of the scores."""
        return {n: p.detach().clone() for n, p in self.scores.items()}

    def __call__(self, x: Tensor) -> Tensor:
        """Features [B, F] of square maps [B, P, C] (any float type)."""
        x = x.transpose(0, 1).float()
        for block in self.blocks:
            y = block.bn1.act(self._pointwise(x, self._of[id(block.conv_pw)]))
            y = block.bn2.act(self._depthwise(y, block.conv_dw))
            y = self._pointwise(y, self._of[id(block.conv_pwl)])
            x = x + y if block.has_skip else y
        out: Tensor = self.act(self._pointwise(x, self.head))
        return out.mean(dim=0)

    def _pointwise(self, x: Tensor, name: str) -> Tensor:
        weight = _Masked.apply(self.scores[name], self.weights[name]).flatten(1)
        if self.precise:
            return linear(x, weight, self.shifts[name])
        return linear(x.bfloat16(), weight.bfloat16()).float() + self.shifts[name]

    def _depthwise(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        name, kernel = self._of[id(conv)], conv.kernel_size[0]
        weight = _Masked.apply(self.scores[name], self.weights[name]).flatten(1).T  # [kernel * kernel, C]
        taps, seen = _taps(isqrt(len(x)), kernel, conv.stride[0], isinstance(conv, Conv2dSame))
        return _Depthwise.apply(x, weight[taps] * seen[..., None], seen) + self.shifts[name]


@cache
def _taps(side: int, kernel: int, stride: int, same: bool) -> tuple[Tensor, Tensor]:
    """For each output and input position of square maps: which tap joins them, and whether one does, [P, Q] each."""
    out = -(-side // stride)
    before = max((out - 1) * stride + kernel - side, 0) // 2 if same else kernel // 2
    far = torch.arange(side)[None] - stride * torch.arange(out)[:, None] + before  # from an output row to an input row
    down, right = far[:, None, :, None].expand(out, out, side, side), far[None, :, None].expand(out, out, side, side)
    seen = (down >= 0) & (down < kernel) & (right >= 0) & (right < kernel)
    taps = torch.where(seen, down * kernel + right, 0)
    return taps.reshape(out**2, side**2), seen.reshape(out**2, side**2)
