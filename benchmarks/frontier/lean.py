"""The masked tail of an EfficientNet on stored features, twice as fast as ``training.masking`` on a CPU.

Maps of 2 x 2 are so small that a convolution is a matrix product (bfloat16 where the processor multiplies it) or, by
channel, sixteen multiplications. Masks, losses and gradients are the trainer's, to the rounding of the products.
"""

from collections.abc import Mapping
from typing import Any

import torch
from timm.models import EfficientNet
from timm.models._efficientnet_blocks import InvertedResidual
from torch import Tensor, nn
from torch.nn.functional import linear

from cascade.backbone import Backbone


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
    """x [P, B, C] under taps [P, P, C]: ``y[p] = sum over q of x[q] * taps[p, q]``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: Tensor) -> Tensor:
        ctx.save_for_backward(x, taps)
        y = torch.zeros_like(x)
        for p in range(len(x)):
            for q in range(len(x)):
                y[p].addcmul_(x[q], taps[p, q])
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (x, taps), g = ctx.saved_tensors, gradients[0]
        gx, gt = torch.zeros_like(x), torch.empty_like(taps)
        for p in range(len(x)):
            for q in range(len(x)):
                gx[q].addcmul_(g[p], taps[p, q])
                gt[p, q] = (g[p] * x[q]).sum(dim=0)
        return gx, gt


class Tail:
    """Scores on a backbone's last stages, and the pass through them.

    Args:
        side: of the square maps that enter; the stages keep it.
    """

    def __init__(self, backbone: Backbone, start: int, side: int = 2) -> None:
        model = backbone.model
        assert isinstance(model, EfficientNet)
        blocks: list[Any] = [b for s in backbone.row[start:-1] for b in model.get_submodule(s.name).children()]
        assert all(type(b) is InvertedResidual and b.conv_dw.stride == (1, 1) for b in blocks), "only such blocks"
        self.side, self.blocks = side, blocks
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
        """Features [B, F] of maps [B, P, C] (any float type)."""
        x = x.transpose(0, 1).float()
        for block in self.blocks:
            y = block.bn1.act(self._pointwise(x, self._of[id(block.conv_pw)]))
            y = block.bn2.act(self._depthwise(y, self._of[id(block.conv_dw)], block.conv_dw.kernel_size[0]))
            y = self._pointwise(y, self._of[id(block.conv_pwl)])
            x = x + y if block.has_skip else y
        out: Tensor = self.act(self._pointwise(x, self.head))
        return out.mean(dim=0)

    def _pointwise(self, x: Tensor, name: str) -> Tensor:
        weight = _Masked.apply(self.scores[name], self.weights[name]).flatten(1)
        if self.precise:
            return linear(x, weight, self.shifts[name])
        return linear(x.bfloat16(), weight.bfloat16()).float() + self.shifts[name]

    def _depthwise(self, x: Tensor, name: str, kernel: int) -> Tensor:
        weight = _Masked.apply(self.scores[name], self.weights[name]).flatten(1).T  # [kernel * kernel, C]
        at = torch.arange(self.side**2)
        rows, columns = at // self.side, at % self.side
        down, right = (v[None, :] - v[:, None] + kernel // 2 for v in (rows, columns))  # from output p to input q
        taps = weight[(down * kernel + right).clamp(0, kernel**2 - 1)]
        seen = (down >= 0) & (down < kernel) & (right >= 0) & (right < kernel)
        return _Depthwise.apply(x, taps * seen[..., None]) + self.shifts[name]
