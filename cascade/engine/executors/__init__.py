"""Executors: ways to run a pass, or a part of one, under a mask. One module each, one interface.

    plain    the timm model as it is: the reference, and what training runs
    folded   PyTorch, BatchNorm folded, channels last
    onnx     ONNX Runtime, the weights as inputs in the order of its own kernels
    cuda     the folded model as CUDA graphs, in float32, TF32 or bfloat16

Each keeps masks in its own form (``pack``), materializes their weights within the budget of the weight cache (``swap``)
and runs stages of the backbone under the mask that is in place (``run``). ``selection.choose`` takes the fastest.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from cascade.engine.weight_cache import WeightCache
from cascade.model.backbone import Backbone
from cascade.model.masks import Mask


class Executor(Protocol):
    """What the engine asks of an executor."""

    backbone: Backbone
    weight_cache: WeightCache

    def pack(self, mask: Mask) -> Mask:
        """The mask in the form that ``swap`` takes; what it holds beyond that is given up."""
        ...

    def size(self, mask: Mask) -> int:
        """Bytes of the mask's materialized weights."""
        ...

    def prepare(self, masks: Sequence[Mask], size: int, domain: int = 0) -> None:
        """Build what passes of a bundle will need, outside of any pass and beside them.

        Args:
            masks: packed, the dispatcher first, then the experts. size: side of the images, pixels.
            domain: stage before which images are dispatched to bundles; 0: they are not.
        """
        ...

    def swap(self, mask: Mask | None) -> None:
        """Make a packed mask (None: the plain backbone) the one that the next runs use, from its first stage on."""
        ...

    def prefetch(self, mask: Mask) -> None:
        """Begin with the weights of the mask that comes next, beside the pass that runs, if there is room."""
        ...

    def run(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Stages ``start`` to ``stop`` (None: to the end, with pooling) of the backbone."""
        ...

    def bytes(self) -> int:
        """Memory of the resident backbone, without materialized masks."""
        ...


@runtime_checkable
class Distinct(Executor, Protocol):
    """An executor that can run a batch with one mask per image, which pays where each launch costs time."""

    def run_each(self, x: Tensor, masks: Sequence[Mask], start: int, stop: int | None = None) -> Tensor:
        """Stages ``start`` to ``stop`` with row n under packed ``masks[n]``, which begins at ``start`` or before."""
        ...
