"""CUDA: the folded model as graphs that are captured once and serve every mask, and one mask per image.

A graph replays launches with the addresses at capture. So every swap writes into one working buffer that never moves: a
graph serves all masks, and a swap is one launch and a copy of the shifts. On a GPU, small batches spend their time on
single launches, which a graph issues without the CPU.
"""

import contextlib
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from cascade.engine.executors.folded import FoldedExecutor
from cascade.engine.executors.graph import Graph
from cascade.engine.executors.precision import DEVICE, products
from cascade.engine.weight_cache import WeightCache
from cascade.kernels.per_image import Masks
from cascade.kernels.weight_layout import PackedMask
from cascade.model.backbone import Backbone
from cascade.model.masks import Mask
from cascade.model.stages import stages

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)
"""Batch sizes of the graphs; smaller batches are padded, larger ones are split."""

PREPARED = 32
"""Graphs up to this batch size are captured when a bundle is added; larger ones when a batch first needs them."""

GRAPHS = 256
"""Most graphs to keep; the least recently used one is evicted first (LRU)."""


class CudaExecutor(FoldedExecutor):
    """The folded model on a GPU; on a CPU, for tests, the same without kernels and graphs.

    It owns the working buffer and bypasses the weight cache: a swap takes microseconds.

    Args:
        backbone, weight_cache, dtype: see ``FoldedExecutor``.
        tf32: compute float32 products in TF32.
    """

    def __init__(
        self, backbone: Backbone, weight_cache: WeightCache, dtype: torch.dtype = torch.float32, tf32: bool = False
    ) -> None:
        with DEVICE:
            super().__init__(backbone, weight_cache, dtype)
            from cascade.engine.executors.per_image import Bound, distinct_model  # importing triton takes a moment

            self.tf32 = tf32
            self.layout.loose = {name: t.to(dtype) for name, t in self.layout.loose.items()}
            self._buffer, self._shifts = torch.empty_like(self.plain), self.layout.shifts.clone()
            self._loose = {name: t.clone() for name, t in self.layout.loose.items()}
            self._changed: set[str] = set()  # loose tensors that the last mask changed
            self._last: Callable[[], PackedMask | None] = lambda: None  # weak reference to the mask in the buffer
            self._graphs: OrderedDict[tuple[Any, ...], Graph] = OrderedDict()
            self._prepared: set[tuple[int, int, int, int]] = set()
            self._stream = self._pool = None
            if self.plain.is_cuda:
                self._stream, self._pool = torch.cuda.Stream(self.plain.device), torch.cuda.graph_pool_handle()
            masked = self.plain if self.layout.plain is self.layout.pristine else self.layout.pristine.to(dtype)
            self._bound = Bound(masked, kernels=self.plain.is_cuda)
            self._distinct = distinct_model(self.layout, self._bound)
            self._distinct_row = stages(self._distinct) if self._distinct else []

    def pack(self, mask: Mask) -> PackedMask:
        with DEVICE:
            return super().pack(mask)

    def size(self, mask: Mask) -> int:
        """Zero: the buffer is counted in ``bytes``."""
        return 0

    def swap(self, mask: Mask | None) -> None:
        if mask is self._now:
            return
        if mask is None:
            self._now = None
            return
        assert isinstance(mask, PackedMask), "a mask is packed before it is swapped"
        hit = mask is self._last()
        self.weight_cache.count(mask, hit)
        if not hit:
            with DEVICE:
                self._fill(mask)
        self._now, self._last = mask, weakref.ref(mask)

    def prefetch(self, mask: Mask) -> None:
        """Do nothing: there is only one buffer, and it is in use."""

    def prepare(self, masks: Sequence[Mask], size: int, domain: int = 0) -> None:
        """Compile, tune and capture what this bundle's passes launch, for batches of up to ``PREPARED`` images.

        It may run concurrently with passes: it neither depends on the working buffer's content nor changes it.
        """
        packed = [mask for mask in masks if isinstance(mask, PackedMask)]
        start, split = packed[0].start, packed[-1].start  # the dispatcher's, and the experts'
        if (start, split, size, domain) in self._prepared:
            return
        for bucket in sorted((b for b in BUCKETS if b <= PREPARED), reverse=True):  # the others reuse its memory
            x = self.plain.new_zeros((bucket, 3, size, size), dtype=torch.float32)
            trunk = self._run(None, x, 0, start) if start else x
            if domain:
                pooled = self._run(None, x, 0, domain)
                if start > domain:
                    self._run(None, pooled, domain, start)
            middle = self._run(self.layout.first(start), trunk, start, split) if split > start else trunk
            self._run(self.layout.first(split), middle, split)
            if bucket > 1 and self._distinct is not None:
                for x, first, last in ((trunk, start, split), (middle, split, None)):
                    if first != last:
                        self._run_each(x, packed[:1] * bucket, first, last)
        self._prepared.add((start, split, size, domain))

    def run(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        first = None if self._now is None else self.layout.first(max(self._now.start, start))
        return self._run(first, x, start, stop)

    def _run(self, first: int | None, x: Tensor, start: int, stop: int | None = None) -> Tensor:
        """``run``, with the weights of units from ``first`` on in the buffer."""
        run = super().run

        def function(x: Tensor) -> Tensor:
            with self._aimed(first):
                return run(x, start, stop)

        parts = [self._replay((first, start, stop), function, part) for part in x.split(BUCKETS[-1])]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def run_each(self, x: Tensor, masks: Sequence[Mask], start: int, stop: int | None = None) -> Tensor:
        """Run stages ``start`` to ``stop``, image n under ``masks[n]``; afterwards the plain backbone is active.

        For few images per mask: if many share a mask, ``swap`` and ``run`` cost less. No weights are materialized,
        except for a backbone whose masks change more than its layers.

        Args:
            x: features at ``start``, [N, ...].
            masks: packed, N of them; each begins at ``start`` or before.

        Returns:
            the same as ``run``.
        """
        packed = [mask for mask in masks if isinstance(mask, PackedMask)]
        assert len(packed) == len(masks) == len(x) and all(mask.start <= start for mask in packed)
        self.swap(None)
        alone = self._distinct is None or any(mask.loose or mask.steps.numel() for mask in packed)
        if alone or all(mask is packed[0] for mask in packed):
            return self._one_by_one(x, packed, start, stop)
        return self._run_each(x, packed, start, stop)

    def _run_each(self, x: Tensor, masks: Sequence[PackedMask], start: int, stop: int | None) -> Tensor:
        parts = []
        for begin, images in zip(range(0, len(x), BUCKETS[-1]), x.split(BUCKETS[-1]), strict=True):
            batch_masks = list(masks[begin : begin + len(images)])
            batch_masks += batch_masks[:1] * (_bucket(len(batch_masks)) - len(batch_masks))
            firsts = [self.layout.first(mask.start) for mask in batch_masks]
            begins, rows = ([int(where[first]) for first in firsts] for where in (self.layout.begin, self.layout.row))
            with DEVICE:
                self._bound.masks = bound = Masks(batch_masks, begins, rows)
                key = (None, start, stop, "each")
                parts.append(self._replay(key, self._each(start, stop), images, bound.table))
                self._bound.masks = None
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def bytes(self) -> int:
        """Memory of the resident backbone, the working buffer and the graphs."""
        tensors = [self._buffer, self._shifts, *self._loose.values()]
        return super().bytes() + sum(t.nbytes for t in tensors) + sum(graph.bytes for graph in [*self._graphs.values()])

    def _each(self, start: int, stop: int | None) -> Callable[[Tensor, Tensor], Tensor]:
        def function(x: Tensor, table: Tensor) -> Tensor:
            assert self._distinct is not None
            self._bound.table = table
            for stage in self._distinct_row[start:stop]:
                x = stage.run(x)
            return x if stop is not None else self._distinct.forward_head(x, pre_logits=True).float()  # type: ignore[operator]

        return function

    def _one_by_one(self, x: Tensor, masks: Sequence[PackedMask], start: int, stop: int | None) -> Tensor:
        features: dict[int, Tensor] = {}
        for mask in dict.fromkeys(masks):
            rows = [row for row, other in enumerate(masks) if other is mask]
            self.swap(mask)
            features.update(zip(rows, self.run(x[rows], start, stop), strict=True))
        self.swap(None)
        return torch.stack([features[row] for row in range(len(masks))])

    def _replay(self, key: tuple[Any, ...], function: Callable[..., Tensor], x: Tensor, *others: Tensor) -> Tensor:
        """Replay or capture a function of ``x``, at most a bucket of images, and of other inputs of full bucket size.

        The key begins with the first unit whose weights come from the buffer, or None.
        """
        bucket = _bucket(len(x))
        key = (*key, bucket, x.shape[1:])
        # A graph is captured, and launched, on the current device.
        with torch.inference_mode(), DEVICE, torch.cuda.device_of(self.plain):
            if key not in self._graphs:
                place = x.new_zeros((bucket, *x.shape[1:]), dtype=self.dtype)
                place = place.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else place
                inputs = [place, *(t.clone() for t in others)]
                with products(self.tf32, self.plain.device):
                    self._graphs[key] = Graph(function, inputs, self._stream, self._pool)
            self._graphs.move_to_end(key)
            if len(self._graphs) > GRAPHS:
                if self.plain.is_cuda:
                    torch.cuda.synchronize()  # the evicted graph may be running
                self._graphs.popitem(last=False)
            return self._graphs[key](x, *others)

    def _fill(self, mask: PackedMask) -> None:
        """Write a mask's weights, shifts and loose tensors where the graphs read them."""
        first = self.layout.first(mask.start)
        self.materialize(mask, self._buffer[self.layout.begin[first] :])
        self._shifts[self.layout.row[first] :].copy_(mask.shifts)
        for name in self._changed | mask.loose.keys():  # also those that only the last mask changed
            self._loose[name].copy_(mask.loose.get(name, self.layout.loose[name]))
        self._changed = set(mask.loose)

    @contextlib.contextmanager
    def _aimed(self, first: int | None) -> Iterator[None]:
        """Make the model's parameters from unit ``first`` on views of the buffer, while it runs or is captured."""
        if first is None:
            yield
            return
        begin, row = self.layout.begin[first], self.layout.row[first]
        self.point(first, self._buffer[begin:], self._shifts[row:], self._loose)
        try:
            yield
        finally:
            self.point(first, self.plain[begin:], self.layout.shifts[row:], self.layout.loose)


def _bucket(count: int) -> int:
    return next(bucket for bucket in BUCKETS if bucket >= count)
