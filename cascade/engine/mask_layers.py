"""What a mask switches off, layer by layer, and how that compares with another mask over the same backbone."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from cascade.engine.executors import Executor
from cascade.engine.executors.base import BaseExecutor
from cascade.kernels.weight_layout import PackedMask
from cascade.model.masks import Mask, count_active


@dataclass(frozen=True)
class Layer:
    """The masked weights of one layer.

    Attributes:
        name: of the parameter. stage: index of its stage. weights: how many it has.
        off: how many of them the mask switches off; for a 1-bit delta, how many it lowers.
        other_off, both_off: how many the other mask, and both, switch off; None without another mask.
    """

    name: str
    stage: int
    weights: int
    off: int
    other_off: int | None = None
    both_off: int | None = None


@dataclass(frozen=True)
class _Place:
    """Where the bits of a layer are in an executor's form of a mask that begins at the first stage."""

    name: str
    stage: int
    weights: int
    begin: int
    end: int


def layers(executor: Executor, mask: Mask, other: Mask | None = None) -> list[Layer]:
    """The layers that the mask covers, in the backbone's order; with another mask, those that both cover.

    Args:
        mask, other: in this executor's form. Counting their bits takes milliseconds.
    """
    start = max(mask.start, other.start if other else 0)
    places = [place for place in _places(executor) if place.stage >= start]
    if not places:
        return []
    bounds = np.array([bound for place in places for bound in (place.begin, place.end)], np.int64)
    origin = _origin(executor, start)
    mine = _tail(executor, mask, start)
    active = count_active(mine, bounds - origin)[::2].tolist()
    found = [Layer(p.name, p.stage, p.weights, p.weights - n) for p, n in zip(places, active, strict=True)]
    if other is None:
        return found
    theirs = _tail(executor, other, start)
    other_active = count_active(theirs, bounds - origin)[::2].tolist()
    either = count_active(mine | theirs, bounds - origin)[::2].tolist()
    return [
        Layer(layer.name, layer.stage, layer.weights, layer.off, layer.weights - n, layer.weights - m)
        for layer, n, m in zip(found, other_active, either, strict=True)
    ]


def _places(executor: Executor) -> list[_Place]:
    backbone = executor.backbone
    if isinstance(executor, BaseExecutor):  # its bits are in its own order, padded to whole blocks with zeros
        units, begin = executor.layout.folded.units, executor.layout.begin.tolist()
        return [
            _Place(f"{unit.module}.weight", unit.stage, unit.rows * unit.columns, *bounds)
            for unit, bounds in zip(units, pairwise(begin), strict=True)
        ]
    stages, wanted = {segment.parameter: segment.stage for segment in backbone.segments}, backbone.rows()
    spans = [(name, *span) for name, span in backbone.spans.items() if name in wanted]
    return [_Place(name, stages[name], end - begin, begin, end) for name, begin, end in spans]


def _origin(executor: Executor, stage: int) -> int:
    """Where the bits of a stage begin."""
    if isinstance(executor, BaseExecutor):
        return int(executor.layout.begin[executor.layout.first(stage)])
    return executor.backbone.offset(stage)


def _tail(executor: Executor, mask: Mask, stage: int) -> np.ndarray:
    """The packed bits from a stage on, uint8."""
    bits = mask.bits.cpu().numpy()
    skipped = _origin(executor, stage) - _origin(executor, mask.start)
    if skipped % 8 == 0:
        return bits[skipped // 8 :]
    return np.packbits(np.unpackbits(bits, bitorder="little")[skipped:], bitorder="little")


def is_delta(mask: Mask) -> bool:
    """Whether a loaded mask is a 1-bit delta: its zeros lower a weight instead of switching it off."""
    return mask.steps.numel() > 0 if isinstance(mask, PackedMask) else bool(mask.deltas)
