"""Learn a mask: scores for frozen weights, a hard threshold in the forward pass, straight-through in the backward pass.

``M = 1[S > mu]`` (strict), forward weight ``W * M / alpha`` with ``alpha = sqrt(mean(M))`` recomputed at
each forward, ``dL/dS := dL/dM`` without clipping, and the gradient flows through alpha, too (paper
§3.1, eq. 1-4; method.md §1). PyTorch's parametrizations attach the scores to any timm model's weights.
"""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from cascade.bundle.format import strip_prefix
from cascade.kernels.materialize import materialize
from cascade.model import masks
from cascade.model.backbone import Backbone, Segment
from cascade.model.masks import Mask
from cascade.model.stages import Stage, stage_of, stages

Amp = Literal["off", "bf16", "fp16"]
Adapt = Literal["mask", "channels", "both"]
TIE = 1e-3  # of the initial score: lead of the largest weight's score if only the order of the scores counts


class _Masked(torch.autograd.Function):
    """``W * M / alpha`` with a straight-through estimator: scores get the gradient of M, including that through alpha.

    With G the gradient of the output Y and N weights per block,  dL/dS = (G W - sum(G Y) / (2 N alpha)) / alpha.
    The backward pass needs only tensors that exist anyway: the frozen weights and Y, which the layer keeps as well.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, weight: Tensor, parametrization: "ThresholdMask") -> Tensor:
        blocks = _blocks(parametrization.ones(), parametrization.rows)
        size = blocks[0].numel()
        alpha = _sums(blocks).div_(size).clamp_(min=1 / size).sqrt_()
        masked = blocks.mul_(_blocks(weight, len(alpha))).div_(alpha).reshape(weight.shape)
        ctx.save_for_backward(weight, masked, alpha)
        return masked

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        *tensors, alpha = ctx.saved_tensors
        weight, masked, gradient = (_blocks(x, len(alpha)) for x in (*tensors, gradients[0]))
        # The sum is 0 if nothing is active, because alpha is then constant.
        through = _sums(gradient * masked).div_(-2 * masked[0].numel()).div_(alpha)
        return torch.addcmul(through, gradient, weight).div_(alpha).reshape(gradients[0].shape), None, None


def _blocks(x: Tensor, rows: int) -> Tensor:
    """View ``x`` as ``rows`` row blocks: [n, ...] to [rows, n / rows, ...], in any memory format."""
    return x.unflatten(0, (rows, -1))


def _sums(blocks: Tensor) -> Tensor:
    """The sum of each block, [rows, 1, ...]. One after the other, because a sum over some axes is much slower."""
    return torch.stack([block.sum() for block in blocks]).view(-1, *[1] * (blocks.dim() - 1))


class ThresholdMask(nn.Module):
    """The parametrization of one weight (if fused, of ``rows`` row blocks with an alpha each).

    Attributes:
        scores: of the weight's shape. threshold, share, free: which of them are active, see :func:`active`.
    """

    def __init__(
        self,
        weight: Tensor,
        rows: int,
        initial: float,
        threshold: float,
        share: float | None = None,
        free: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.rows, self.threshold, self.share = rows, threshold, share
        scores = torch.full_like(weight, initial)
        if share is not None:  # equal scores have no order, so start with the largest weights active
            scores += TIE * weight.abs() / weight.abs().max().clamp(min=1e-12)
        self.scores = nn.Parameter(scores)
        self.free = free

    def active(self) -> Tensor:
        """M, bool of the weight's shape."""
        return active(self.scores.detach(), self.threshold, self.share, self.free)

    def ones(self) -> Tensor:
        """M as 0 and 1 in the scores' type. If only the threshold counts, the comparison writes them itself."""
        if self.share is None and self.free is None:
            return torch.gt(self.scores.detach(), self.threshold, out=torch.empty_like(self.scores))
        return self.active().to(self.scores.dtype)

    def forward(self, weight: Tensor) -> Tensor:
        scores = self.scores if self.free is None else torch.where(self.free, self.scores, self.scores.detach())
        masked: Tensor = _Masked.apply(scores, weight, self)
        return masked


def active(scores: Tensor, threshold: float, share: float | None = None, free: Tensor | None = None) -> Tensor:
    """M, bool of the scores' shape.

    Args:
        threshold: mu; scores above it are active.
        share: replaces the threshold: the share with the highest scores is active, at least one weight (Ramanujan et
            al. 2020; the paper's appendix E).
        free: bool, the weights that may be switched off; the others are always active and not trained (appendix F).
    """
    if share is None:
        on = scores > threshold
    else:
        highest = scores.flatten().topk(max(1, round(share * scores.numel())), sorted=False).indices
        on = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
        on[highest] = True
        on = on.view_as(scores)
    return on if free is None else on | ~free


def select(
    backbone: Backbone, start: int, how: Literal["random", "largest"], share: float, seed: int = 0
) -> dict[str, Tensor]:
    """Select the weights that may be switched off, a share of each tensor, bool by parameter (appendix F).

    Args:
        how: drawn with ``seed``, or those with the largest magnitude.
    """
    shapes = {name: p.shape for name, p in backbone.model.named_parameters()}
    free = {}
    for nth, (name, (begin, end)) in enumerate(backbone.spans.items()):
        weight = backbone.weights[begin:end]
        generator = torch.Generator().manual_seed(seed * 65_537 + nth)
        order = torch.rand(len(weight), generator=generator).to(weight) if how == "random" else weight.abs()
        if begin >= backbone.offset(start):
            free[name] = active(order, 0.0, share).view(shapes[name])
    return free


@dataclass
class MaskedModel:
    """A copy of a backbone whose adapter is trained from stage ``start`` on; everything before is frozen.

    Attributes:
        backbone: the pristine original.
        model: the copy.
        start, stop: the first stage that is adapted, and the first one after it that is not.
        train_norms: whether BatchNorms from ``start`` on run in train mode.
        amp: type of a pass under autocast, see ``Recipe.amp``.
        adapt: what is trained: scores (``mask``), scales and shifts (``channels``), or both.
        head_only: no gradient flows into the network, because only the head is currently trained.
    """

    backbone: Backbone
    model: nn.Module
    stages: list[Stage]
    start: int
    train_norms: bool
    stop: int
    amp: Amp = "off"
    adapt: Adapt = "mask"
    head_only: bool = False

    @property
    def groups(self) -> dict[str, dict[str, nn.Parameter]]:
        """Trained parameters by kind (each with its own learning rate) and name."""
        return {kind: group for kind, group in (("scores", self.scores), ("channels", self.channels)) if group}

    @property
    def learned(self) -> dict[str, nn.Parameter]:
        """Trained parameters by name."""
        return {name: p for group in self.groups.values() for name, p in group.items()}

    @property
    def scores(self) -> dict[str, nn.Parameter]:
        """Score tensors by the name of the parameter that they mask, in the order of the flat buffer."""
        segments = (s for s in self.backbone.segments if self.start <= s.stage < self.stop)
        names = dict.fromkeys(s.parameter for s in segments)
        return {name: self._parametrization(name).scores for name in names if self._is_masked(name)}

    @property
    def channels(self) -> dict[str, nn.Parameter]:
        """Trained scales, shifts and biases, one number per channel, by name."""
        return {
            n: p
            for n, p in self.model.named_parameters()
            if p.requires_grad and p.dim() == 1 and "." in n and "parametrizations" not in n
        }

    @property
    def norms(self) -> dict[str, Tensor]:
        """BatchNorm running statistics from ``start`` on, by buffer name."""
        buffers = dict(self.model.named_buffers())
        return {n: buffers[n] for n in self.backbone.norms if stage_of(n, self.stages) >= self.start}

    def train(self) -> None:
        """Set the modes for a training step: everything in eval mode, except the BatchNorms that may adapt."""
        self.model.eval()
        if self.train_norms:
            for name, module in self.model.named_modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm) and stage_of(name, self.stages) >= self.start:
                    module.train()

    def trunk(self, x: Tensor) -> Tensor:
        """Run the frozen stages before ``start``, without autograd."""
        with torch.no_grad(), self._cast(x):
            x = x.contiguous(memory_format=torch.channels_last)  # twice as fast on a CPU
            for stage in self.stages[: self.start]:
                x = stage.run(x)
        return x

    def tail(self, x: Tensor) -> Tensor:
        """Run the adapted stages and the pooling: features [B, F]."""
        with self._cast(x), torch.set_grad_enabled(torch.is_grad_enabled() and not self.head_only):
            x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
            for stage in self.stages[self.start :]:
                x = stage.run(x)
            x = self.model.forward_head(x, pre_logits=True)  # type: ignore[operator]
        return x if self.amp == "off" else x.float()

    def _cast(self, x: Tensor) -> torch.autocast:
        kind = torch.float16 if self.amp == "fp16" else torch.bfloat16
        return torch.autocast(x.device.type, kind, enabled=self.amp != "off")

    def progress(self, share: float) -> None:
        """Set the share of each tensor that is active, by the highest scores (appendix E: progressive)."""
        for name in self.scores:
            self._parametrization(name).share = share

    def active(self) -> float:
        """Share of active weights among those with scores."""
        on = [self._parametrization(name).active() for name in self.scores]
        return sum(int(m.sum()) for m in on) / max(1, sum(m.numel() for m in on))

    def active_bits(self, name: str) -> Tensor:
        """M of one masked parameter, bool [n]."""
        return self._parametrization(name).active().flatten()

    def sparse(self, below: float) -> Iterator[tuple[str, float]]:
        """Yield parameters with an active share of less than ``below``, with the share."""
        for name in self.scores:
            share = float(self._parametrization(name).active().float().mean())
            if share < below:
                yield name, share

    def load(self, learned: Mapping[str, Tensor], norms: Mapping[str, Tensor]) -> None:
        """Load trained values and statistics by name; names that are not trained here are ignored."""
        with torch.no_grad():
            for name, parameter in self.learned.items():
                parameter.copy_(learned[name])
            for name, buffer in self.norms.items():
                buffer.copy_(norms.get(name, self.backbone.norms[name]))

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Load the ``state`` of another model."""
        learned = {name: state[f"{kind}.{name}"] for kind, group in self.groups.items() for name in group}
        self.load(learned, strip_prefix(state, "norms."))

    def state(self) -> dict[str, Tensor]:
        """Trained values and statistics: ``scores.NAME``, ``channels.NAME``, ``norms.NAME``."""
        trained = {f"{kind}.{n}": p.detach() for kind, group in self.groups.items() for n, p in group.items()}
        return trained | {f"norms.{n}": t for n, t in self.norms.items()}

    def _is_masked(self, name: str) -> bool:
        path, _, kind = name.rpartition(".")
        return parametrize.is_parametrized(self.model.get_submodule(path), kind)

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
    stop: int | None = None,
    share: float | None = None,
    free: Mapping[str, Tensor] | None = None,
    amp: Amp = "off",
    adapt: Adapt = "mask",
) -> MaskedModel:
    """Make a trainable copy of ``backbone``; by default with scores on every maskable weight from stage ``start`` on.

    Args:
        initial, threshold: S0 and mu. By Theorems 1 and 2 only their relation to the learning rate matters.
        stop: first stage without scores after ``start`` (None: none). share, free: see :func:`active`, ``free`` by
            parameter.
        amp: type of a pass under autocast, see ``Recipe.amp``.
        below: the mask whose weights, statistics and channels are used in the frozen stages before ``start``.
        adapt: ``mask`` (the paper), ``channels`` (every scale, shift and bias is trained, no scores), or ``both``
            (scores on the weights of two and more dimensions; the rest is trained itself).
    """
    model = deepcopy(backbone.model)
    row = stages(model)
    write(backbone, model, backbone.weights, 0, backbone.norms)  # the copy may contain an executor's mask
    if below is not None:
        first, end = backbone.offset(below.start), backbone.offset(start)
        write(backbone, model, materialize(backbone, below)[: max(0, end - first)], first, below.norms)
    stop = len(row) if stop is None else stop
    model.to(memory_format=torch.channels_last)  # twice as fast on a CPU
    parameters = dict(model.named_parameters())
    for name, tensor in {} if below is None else below.channels.items():
        if stage_of(name, row) < start:
            parameters[name].data.copy_(tensor)
    if adapt != "mask":
        for name, parameter in parameters.items():
            parameter.requires_grad_(parameter.dim() == 1 and start <= stage_of(name, row) < stop)
    rows = _row_blocks([s for s in backbone.segments if start <= s.stage < stop])
    for name, count in rows.items():
        if adapt == "channels" or (adapt == "both" and parameters[name].dim() == 1):
            continue
        path, _, kind = name.rpartition(".")
        module = model.get_submodule(path)
        weight = getattr(module, kind)
        mask = ThresholdMask(weight.detach(), count, initial, threshold, share, (free or {}).get(name))
        parametrize.register_parametrization(module, kind, mask, unsafe=True)
    return MaskedModel(backbone, model, row, start, train_norms, stop, amp, adapt)


def to_mask(
    name: str,
    backbone: Backbone,
    start: int,
    scores: Mapping[str, Tensor],
    norms: Mapping[str, Tensor],
    threshold: float = 0.0,
    share: float | None = None,
    free: Mapping[str, Tensor] | None = None,
    channels: Mapping[str, Tensor] | None = None,
) -> Mask:
    """Convert scores, trained channels (by parameter) and statistics (by buffer) to a packed mask.

    Only statistics that have changed are kept. Weights without scores are active. ``threshold``, ``share``, ``free``:
    see :func:`active`.
    """
    first = backbone.offset(start)
    rows = [
        active(scores[n], threshold, share, (free or {}).get(n)).flatten().cpu()
        if n in scores
        else torch.ones(end - begin, dtype=torch.bool)
        for n, (begin, end) in backbone.spans.items()
        if begin >= first
    ]
    bits = masks.pack(torch.cat(rows)) if rows else torch.zeros(0, dtype=torch.uint8)
    moved = {n: t.detach().clone().cpu() for n, t in norms.items() if not torch.equal(t, backbone.norms[n])}
    trained = {n: t.detach().half().cpu() for n, t in (channels or {}).items()}
    return Mask(name, start, bits.cpu(), moved, trained)


def write(backbone: Backbone, model: nn.Module, flat: Tensor, first: int, norms: Mapping[str, Tensor]) -> None:
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
