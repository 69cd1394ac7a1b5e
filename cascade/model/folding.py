"""Fold each BatchNorm into the convolution before it, so that an adapter is bits, scales and shifts.

    BN(W * M / alpha (*) x + b)  =  (W' * M * scale) (*) x + shift

    BN((W + s * delta) (*) x + b)  =  (W' * scale + s * delta') (*) x + shift

``W'`` is the weight with the backbone's own BatchNorm folded in, one copy for all masks. A mask's alpha, its
BatchNorm statistics, its masked biases and affines and its trained channels all fold into ``scale`` and ``shift``,
one number per row (output channel), computed once in float64 (paper §3, eq. 3; method.md §1). Linear layers carry
1 / alpha the same way.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn

from cascade.errors import CascadeError
from cascade.model.backbone import Backbone, Segment
from cascade.model.masks import Mask, count_active

PLAIN = (nn.Conv2d, Conv2dSame, nn.Linear)
"""Layers that use their weight unchanged; subclasses are excluded, because they may standardize it first."""

LOOSE = 0.05
"""Largest share of the masked weights that may be outside of units: every mask stores its own float32 copy of those."""

OFF = 1e-20
"""A channel whose BatchNorm scale is below this is switched off in the backbone; its scale is not folded."""


@dataclass(frozen=True)
class Unit:
    """One layer whose weights carry a mask.

    Attributes:
        module: its dotted name. norm: that of the BatchNorm folded into it, or None.
        stage: index of its stage.
        offset: of its weights in ``Backbone.weights``.
        shape: of its weight; the first axis gives the rows, the others the columns.
    """

    module: str
    norm: str | None
    stage: int
    offset: int
    shape: tuple[int, ...]

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def columns(self) -> int:
        return math.prod(self.shape[1:])


@dataclass(frozen=True)
class Affine:
    """How a mask changes the rows of one unit: float64 [rows] each.

    Attributes:
        scale: relative to the folded weight. shift: of the output.
        delta: for a 1-bit delta, the amount added to or subtracted from each folded weight; zeros for a mask.
    """

    scale: np.ndarray
    shift: np.ndarray
    delta: np.ndarray


class Folded:
    """A backbone split into units, with its BatchNorms folded where possible.

    Attributes:
        units: in the order of the flat buffer, by stage.
        model: a copy of the backbone's model without the folded BatchNorms. It shares the parameters that no mask
            changes. Each unit has an empty weight and an empty bias for an executor to set.
        loose: names of the tensors outside of units that a mask may change (a LayerNorm's scale, the statistics of a
            BatchNorm that could not be folded).
        always: the loose tensors that every mask changes, because they are masked or are running statistics.

    Raises:
        CascadeError: too many weights are loose.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.units = list(_units(backbone))
        folded_norms = {unit.norm for unit in self.units if unit.norm}
        inside = {f"{unit.module}.weight" for unit in self.units} | {f"{unit.module}.bias" for unit in self.units}
        inside |= {
            f"{norm}.{part}" for norm in folded_norms for part in ("weight", "bias", "running_mean", "running_var")
        }
        self.always = [name for name in (*backbone.spans, *backbone.norms) if name not in inside]
        others = backbone.channels().keys() - inside - set(self.always)
        self.loose = self.always + [name for name in backbone.channels() if name in others]
        weights = sum(end - begin for name, (begin, end) in backbone.spans.items() if name in self.always)
        if weights > LOOSE * backbone.weights.numel():
            raise CascadeError(
                f"{weights / backbone.weights.numel():.0%} of the masked weights of {backbone.name} are in layers that"
                " can't be folded: use the plain executor"
            )
        self._small = {name: t.double().cpu().numpy() for name, t in _small(backbone, self.units, self.always)}
        self._modules = dict(backbone.model.named_modules())
        self._segments: dict[str, list[Segment]] = {}
        for segment in backbone.segments:
            self._segments.setdefault(segment.parameter, []).append(segment)
        self._gains = {unit.module: self._gain(unit) for unit in self.units}
        shared = {id(t): t for t in (*backbone.model.parameters(), *backbone.model.buffers())}
        state = backbone.model.state_dict(keep_vars=True)
        for name in self.loose:  # copies, because masks change them
            tensor = state[name]
            copied_tensor = tensor.detach().clone()
            shared[id(tensor)] = (
                nn.Parameter(copied_tensor, requires_grad=False) if isinstance(tensor, nn.Parameter) else copied_tensor
            )
        self.model = copy.deepcopy(backbone.model, shared)
        for unit in self.units:  # otherwise they would keep the backbone's flat buffer alive
            layer = self.model.get_submodule(unit.module)
            layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)
            layer.bias = nn.Parameter(torch.empty(0), requires_grad=False)
        for name in folded_norms:
            norm = self.model.get_submodule(name)
            parts = [getattr(norm, part) for part in ("drop", "act") if hasattr(norm, part)]  # timm's BatchNormAct2d
            _replace(self.model, name, nn.Sequential(*parts) if parts else nn.Identity())

    def bytes(self) -> int:
        """Memory of the small tensors needed to fold new masks."""
        return sum(values.nbytes for values in (*self._small.values(), *self._gains.values()))

    def weight(self, unit: Unit) -> Tensor:
        """The folded weight ``W'`` of a unit, float32 [rows, columns]."""
        flat = self.backbone.weights[unit.offset : unit.offset + unit.rows * unit.columns]
        weight = flat.view(unit.rows, unit.columns)
        return weight * torch.from_numpy(self._gains[unit.module]).to(weight)[:, None]

    def plain(self, unit: Unit) -> Affine:
        """Scale and shift of a unit without a mask; the scale is 1 unless the backbone switches a channel off."""
        return self.affine(unit, _State(self))

    def affines(self, mask: Mask) -> list[Affine]:
        """How ``mask`` changes each unit from its first stage on."""
        state = _State(self, mask)
        return [self.affine(unit, state) for unit in self.units if unit.stage >= mask.start]

    def loosened(self, mask: Mask) -> dict[str, Tensor]:
        """The ``loose`` tensors that ``mask`` changes, by name."""
        if not self.always and not mask.channels:
            return {}
        state, shapes = _State(self, mask), self.model.state_dict()
        covered = [name for name in self.loose if state.covers(name)]
        return {name: torch.from_numpy(state(name)).float().view(shapes[name].shape) for name in covered}

    def affine(self, unit: Unit, state: "_State") -> Affine:
        """Scale and shift of one unit."""
        scale = 1 / state.alphas(unit)
        shift, delta = np.zeros(unit.rows), state.delta(unit)
        if getattr(self._modules[unit.module], "bias", None) is not None:
            shift = state(f"{unit.module}.bias")
        if unit.norm is None:
            return Affine(scale, shift, delta)
        norm = cast(nn.BatchNorm2d, self._modules[unit.norm])
        multiplier = self._multiplier(unit, state)
        beta = state(f"{unit.norm}.bias") if norm.affine else 0.0
        shift = (shift - state(f"{unit.norm}.running_mean")) * multiplier + beta
        return Affine(scale * multiplier / self._gains[unit.module], shift, delta * multiplier)

    def _gain(self, unit: Unit) -> np.ndarray:
        """The factor folded into each row of the weight, float64 [rows], never zero.

        It is the backbone's own BatchNorm multiplier, or 1 where the backbone switches the channel off, since a mask
        with a trained scale may switch it on.
        """
        gain = self._multiplier(unit, _State(self))
        return np.where(np.abs(gain) < OFF, 1.0, gain)

    def _multiplier(self, unit: Unit, state: "_State") -> np.ndarray:
        """The factor that a unit's BatchNorm applies to each row, float64 [rows]; ones without a BatchNorm."""
        if unit.norm is None:
            return np.ones(unit.rows)
        norm = cast(nn.BatchNorm2d, self._modules[unit.norm])
        gamma = state(f"{unit.norm}.weight") if norm.affine else np.ones(unit.rows)
        return np.asarray(gamma / np.sqrt(state(f"{unit.norm}.running_var") + norm.eps))


class _State:
    """The backbone's small tensors under one mask (None: no mask), float64."""

    def __init__(self, folded: Folded, mask: Mask | None = None) -> None:
        self.backbone, self.small, self.segments, self.mask = folded.backbone, folded._small, folded._segments, mask
        backbone = folded.backbone
        self.first = backbone.offset(mask.start) if mask else backbone.weights.numel()
        if mask is None:
            return
        self.bits = mask.bits.cpu().numpy()
        covered = [s for s in backbone.segments if s.offset >= self.first]
        bounds = np.array([s.offset - self.first for s in covered] + [backbone.weights.numel() - self.first])
        share = np.maximum(count_active(self.bits, bounds), 1) / np.diff(bounds)
        roots = np.ones(len(share)) if mask.deltas else np.sqrt(share)
        self.alpha = {s.offset: a for s, a in zip(covered, roots.tolist(), strict=True)}

    def __call__(self, name: str) -> np.ndarray:
        """A bias, an affine or a statistic, flat."""
        for trained in (self.mask.norms, self.mask.channels) if self.mask else ():
            if name in trained:
                return np.asarray(trained[name].double().cpu().numpy())
        if self.mask and name in self.mask.deltas:
            delta = self.mask.deltas[name].double().cpu().numpy()
            sign = 2.0 * self._active(name) - 1
            return np.asarray(self.small[name] + (sign.reshape(len(delta), -1) * delta[:, None]).ravel())
        return self.small[name] * self._ratio(name)

    def delta(self, unit: Unit) -> np.ndarray:
        """The delta of each row of a unit's weight; zeros for a mask."""
        delta = self.mask.deltas.get(f"{unit.module}.weight") if self.mask else None
        return np.zeros(unit.rows) if delta is None else np.asarray(delta.double().cpu().numpy())

    def covers(self, name: str) -> bool:
        """Whether the mask changes a loose tensor."""
        assert self.mask is not None
        masked = name in self.backbone.spans and self.backbone.spans[name][0] >= self.first
        return masked or name in self.mask.norms or name in self.mask.channels

    def _ratio(self, name: str) -> np.ndarray | float:
        """M / alpha of a small parameter, one alpha per row block; 1 if it carries no mask."""
        if name not in self.backbone.spans or self.backbone.spans[name][0] < self.first:
            return 1.0
        if self.mask and self.mask.deltas:
            return 1.0
        return np.asarray(self._active(name) / self._blocks(name))

    def _active(self, name: str) -> np.ndarray:
        """The bits of one parameter, uint8 [n]."""
        begin, end = (index - self.first for index in self.backbone.spans[name])
        bits = np.unpackbits(self.bits[begin // 8 : -(-end // 8)], bitorder="little")
        return bits[begin % 8 :][: end - begin]

    def alphas(self, unit: Unit) -> np.ndarray:
        """Alpha of each row of a unit's weight."""
        return self._blocks(f"{unit.module}.weight", unit.columns) if unit.offset >= self.first else np.ones(unit.rows)

    def _blocks(self, name: str, width: int = 1) -> np.ndarray:
        return np.concatenate([np.full(s.size // width, self.alpha[s.offset]) for s in self.segments[name]])


def _units(backbone: Backbone) -> Iterator[Unit]:
    follows = _follows(backbone)
    stages = {s.parameter: s.stage for s in backbone.segments}
    for parameter, (begin, _) in backbone.spans.items():
        name = parameter.removesuffix(".weight")
        layer = backbone.model.get_submodule(name) if name != parameter else None
        if type(layer) in PLAIN:
            shape = tuple(cast(Tensor, layer.weight).shape)  # type: ignore[union-attr]
            yield Unit(name, follows.get(name), stages[parameter], begin, shape)


@torch.inference_mode()
def _follows(backbone: Backbone) -> dict[str, str]:
    """The BatchNorm that follows each convolution, by name, observed in one forward pass."""
    outputs: dict[int, tuple[str, Tensor]] = {}
    follows: dict[str, str] = {}
    hooks = []
    for name, module in backbone.model.named_modules():
        if type(module) in PLAIN:
            hooks.append(module.register_forward_hook(lambda m, i, out, n=name: outputs.update({id(out): (n, out)})))
        elif isinstance(module, nn.BatchNorm2d):

            def record(m: nn.Module, inputs: tuple[Tensor, ...], norm: str = name) -> None:
                if (producer := outputs.get(id(inputs[0]))) is not None:
                    follows[producer[0]] = norm

            hooks.append(module.register_forward_pre_hook(record))
    try:
        backbone.model(torch.zeros(1, *backbone.config["input_size"], device=backbone.weights.device))
    finally:
        for hook in hooks:
            hook.remove()
    return follows


def _small(backbone: Backbone, units: list[Unit], loose: list[str]) -> Iterator[tuple[str, Tensor]]:
    """All running statistics, and the biases and affines that belong to units or are loose."""
    yield from backbone.norms.items()
    parameters = dict(backbone.model.named_parameters())
    owners = {f"{module}.{part}" for u in units for module in (u.module, u.norm) for part in ("weight", "bias")}
    weights = {f"{u.module}.weight" for u in units}
    for name in (owners - weights) | set(loose):
        if name in backbone.spans:
            begin, end = backbone.spans[name]
            yield name, backbone.weights[begin:end]
        elif name in parameters:
            yield name, parameters[name].detach().flatten()


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
