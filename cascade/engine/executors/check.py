"""Check that an executor computes what the plain model does, before the plain model is released.

Folding traces the data through one pass and assumes that layers behave as usual: if a model reads a weight without
calling its layer, the folded model silently gives wrong features. So each executor is compared on two images: without a
mask, under masks that change everything a mask can change, and with one mask per image.
"""

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from cascade.engine.executors import Distinct, Executor
from cascade.engine.executors.plain import PlainExecutor
from cascade.engine.weight_cache import WeightCache
from cascade.errors import CascadeError
from cascade.model.backbone import Backbone
from cascade.model.masks import Mask, pack

EXACT, TF32, ROUNDED = 1e-3, 0.03, 0.1
"""Relative errors allowed in float32, TF32 and bfloat16; correct executors stay below 2e-6, 1.3e-2 and 2e-2."""


class _Uncounted(WeightCache):
    """A cache that is left out of the metrics."""

    def count(self, key: Hashable, hit: bool) -> None:
        pass

    def _use(self, size: int) -> None:
        self.used += size


@dataclass(frozen=True)
class Reference:
    """Features of the plain model, to compare executors with.

    Attributes:
        x: float32 [2, 3, S, S].
        features: of ``x``, float32 [2, F], by name and mask (None: no mask).
    """

    x: Tensor
    features: list[tuple[str, Mask | None, Tensor]]

    @classmethod
    def of(cls, backbone: Backbone, size: int) -> "Reference":
        """Compute the reference, while the backbone still has its weights. size: side of the images, pixels."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, 3, size, size, generator=generator).to(backbone.weights.device)
        plain = PlainExecutor(backbone, _Uncounted(2 * backbone.weights.nbytes))
        masks = {
            "the plain backbone": None,
            "a mask": _mask(backbone, generator),
            "another mask": _mask(backbone, generator),
        }
        return cls(x, [(name, mask, _features(plain, mask, x)) for name, mask in masks.items()])


def check(executor: Executor, reference: Reference, tolerance: float = EXACT) -> float:
    """Compare an executor with the plain model.

    Args:
        tolerance: allowed relative error of the features.

    Returns:
        the largest relative error.

    Raises:
        CascadeError: they differ.
    """
    errors = {}
    for name, mask, want in reference.features:
        errors[name] = _error(_features(executor, mask, reference.x), want)
    if isinstance(executor, Distinct):
        masks = [mask for _, mask, _ in reference.features if mask is not None]
        want = torch.stack([reference.features[1 + row][2][row] for row in range(len(masks))])
        got = executor.run_each(reference.x, [executor.pack(mask) for mask in masks], 0).float()
        errors["a mask for each image"] = _error(got, want)
    for name, error in errors.items():
        if not error <= tolerance:  # nor is NaN
            raise CascadeError(
                f"this executor gives other features than the model under {name} of {executor.backbone.name} (relative"
                f" error {error:.2g}): choose another one, plain runs everything"
            )
    return max(errors.values())


def _error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def _features(executor: Executor, mask: Mask | None, x: Tensor) -> Tensor:
    """Features [N, F] under a mask, whose weights are materialized outside the budget and released afterwards."""
    shared = executor.weight_cache
    packed = None if mask is None else executor.pack(mask)
    try:
        executor.weight_cache = _Uncounted(2 * executor.backbone.weights.nbytes + (1 << 24))
        executor.swap(packed)
        return executor.run(x).float()
    finally:
        executor.swap(None)
        executor.weight_cache = shared


def _mask(backbone: Backbone, generator: torch.Generator) -> Mask:
    """A mask that changes nine out of ten weights, all statistics, and a third of the channels."""
    bits = pack(torch.rand(backbone.weights.numel(), generator=generator) < 0.9).to(backbone.weights.device)
    norms = {name: _moved(tensor, generator) for name, tensor in backbone.norms.items()}
    state = backbone.model.state_dict()
    chosen = list(backbone.channels())[::3]
    channels = {name: _moved(state[name], generator).half() for name in chosen}
    return Mask("check", 0, bits, norms, channels)


def _moved(tensor: Tensor, generator: torch.Generator) -> Tensor:
    return (tensor.cpu() * (0.9 + 0.2 * torch.rand(tensor.shape, generator=generator))).to(tensor)
