"""Executors: ways to run all or part of a pass under a mask. One module each, one interface.

    plain    the timm model as it is: the reference, and what training runs
    folded   PyTorch, BatchNorm folded, channels last
    onnx     ONNX Runtime, the weights as inputs in the order of its own kernels; on a GPU its CUDA provider
    cuda     the folded model as CUDA graphs, in float32, TF32 or bfloat16

Each stores masks in its own form (``pack``), materializes their weights within the weight cache's budget (``swap``) and
runs stages of the backbone under the current mask (``run``). ``selection.choose`` picks the fastest.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from cascade.engine.weight_cache import WeightCache
from cascade.model.backbone import Backbone
from cascade.model.masks import Mask


class Executor(Protocol):
    """What the engine needs from an executor.

    Attributes:
        backbone: the resident one. weight_cache: materialized weights, shared between backbones.
        kind: one of ``selection.KINDS``. error: largest relative error of its features when it was chosen.
    """

    backbone: Backbone
    weight_cache: WeightCache
    kind: str
    error: float

    def pack(self, mask: Mask) -> Mask:
        """Convert a mask to the form that ``swap`` takes; anything else is dropped."""
        ...

    def size(self, mask: Mask) -> int:
        """Bytes of the mask's materialized weights."""
        ...

    def export(self, masks: Sequence[Mask], size: int, domain: int = 0) -> None:
        """Do beforehand, in another process, what ``prepare`` would do in this one at the expense of other passes.

        Nothing happens where ``prepare`` delays no pass, or the other process fails. Arguments as for ``prepare``; the
        masks need not be packed. Several threads may call it.
        """
        ...

    def prepare(self, masks: Sequence[Mask], size: int, domain: int = 0, batch: int = 32) -> None:
        """Build what a bundle's passes will need, concurrently with other passes.

        Args:
            masks: packed, the dispatcher first, then the experts. size: side of the images, pixels.
            domain: stage before which images are dispatched to bundles; 0 for no dispatch.
            batch: most images in a pass.
        """
        ...

    def forget(self, masks: Sequence[Mask]) -> None:
        """Free what ``prepare`` has built for these masks, unless other bundles need it. No pass may run meanwhile."""
        ...

    def swap(self, mask: Mask | None) -> None:
        """Apply a packed mask (None: the plain backbone) for the next runs, from its first stage on."""
        ...

    def prefetch(self, mask: Mask) -> None:
        """Start to materialize the next mask's weights during the current pass, if they fit."""
        ...

    def run(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Run stages ``start`` to ``stop`` (None: to the end, with pooling) of the backbone."""
        ...

    def bytes(self) -> int:
        """Memory of the resident backbone, without materialized masks."""
        ...


@runtime_checkable
class Distinct(Executor, Protocol):
    """An executor that can run a batch with one mask per image, which pays off if launches are expensive."""

    def run_each(self, x: Tensor, masks: Sequence[Mask], start: int, stop: int | None = None) -> Tensor:
        """Run stages ``start`` to ``stop``, row n under packed ``masks[n]``, which begins at ``start`` or before."""
        ...
