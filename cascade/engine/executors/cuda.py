"""CUDA: the folded model as graphs that are captured once and serve every mask, and one mask per image.

A graph replays launches with the addresses at capture. So every swap writes into one working buffer that never moves: a
graph serves all masks, and a swap is one launch and a copy of the shifts. On a GPU, small batches spend their time on
single launches, which a graph issues without the CPU.
"""

import contextlib
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cascade.engine.executors.folded import FoldedExecutor
from cascade.engine.executors.graph import Graph
from cascade.engine.executors.precision import DEVICE, products
from cascade.engine.items import upload
from cascade.engine.weight_cache import WeightCache
from cascade.kernels.per_image import Masks
from cascade.kernels.weight_layout import PackedMask
from cascade.model.backbone import Backbone
from cascade.model.masks import Mask
from cascade.model.stages import stages

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)
"""Batch sizes of the graphs; smaller batches are padded, and those beyond what is prepared are split."""

GRAPHS = 64
"""Most graphs that no bundle has prepared; the least recently used one is evicted first (LRU)."""

PAUSE = 0.001
"""Seconds between two captures in which a waiting pass gets the device; a lock alone would go to whoever had it."""


@dataclass(frozen=True)
class Prepared:
    """The graphs of bundles of one shape.

    Attributes:
        dispatchers: of the bundles that need them. keys: of the graphs.
    """

    dispatchers: set[PackedMask] = field(default_factory=set)
    keys: set[tuple[Any, ...]] = field(default_factory=set)


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
            self._prepared: dict[Hashable, Prepared] = {}
            self._most = BUCKETS[-1]  # images of the largest graph
            self._stream = self._pool = None
            if self.plain.is_cuda:
                self._stream, self._pool = torch.cuda.Stream(self.plain.device), torch.cuda.graph_pool_handle()
            masked = self.plain if self.layout.plain is self.layout.pristine else self.layout.pristine.to(dtype)
            self._bound = Bound(masked, kernels=self.plain.is_cuda)
            self._distinct = distinct_model(self.layout, self._bound)
            self._distinct_row = stages(self._distinct) if self._distinct else []

    def pack(self, mask: Mask) -> PackedMask:
        packed = super().pack(mask)  # on the CPU, which takes a while
        with DEVICE:
            return packed.to(self.plain.device)

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

    def prepare(self, masks: Sequence[Mask], size: int, domain: int = 0, batch: int = 32) -> None:
        """Compile, tune and capture what this bundle's passes launch, unless another bundle needs the same.

        It may run concurrently with passes: it neither depends on the working buffer's content nor changes it.
        """
        packed = [mask for mask in masks if isinstance(mask, PackedMask)]
        start, split = packed[0].start, packed[-1].start  # the dispatcher's, and the experts'
        self._most = _bucket(min(batch, BUCKETS[-1]))
        prepared = self._prepared.setdefault((start, split, size, domain, self._most), Prepared())
        prepared.dispatchers.add(packed[0])
        if len(prepared.dispatchers) > 1:
            return

        def run(first: int | None, x: Tensor, start: int, stop: int | None = None) -> Tensor:
            prepared.keys.add(_key((first, start, stop), x))
            time.sleep(PAUSE)
            return self._run(first, x, start, stop)

        for bucket in sorted((b for b in BUCKETS if b <= self._most), reverse=True):  # the others reuse its memory
            x = self.plain.new_zeros((bucket, 3, size, size), dtype=torch.float32)
            trunk = run(None, x, 0, start) if start else x
            if domain:
                pooled, end = run(None, x, 0, domain), len(self.backbone.stages)
                if start > domain:
                    run(None, pooled, domain, start)
                run(self.layout.first(end), run(None, pooled, domain, end), end)  # of images that fit no bundle
            middle = run(self.layout.first(start), trunk, start, split) if split > start else trunk
            run(self.layout.first(split), middle, split)
            if bucket > 1 and self._distinct is not None:
                for x, first, last in ((trunk, start, split), (middle, split, None)):
                    if first != last:
                        prepared.keys.add(_key((None, first, last, "each"), x))
                        time.sleep(PAUSE)
                        self._run_each(x, packed[:1] * bucket, first, last)

    def forget(self, masks: Sequence[Mask]) -> None:
        """Free the graphs that only bundles with these masks needed."""
        gone: set[tuple[Any, ...]] = set()
        for shape, prepared in [*self._prepared.items()]:
            if prepared.dispatchers and prepared.dispatchers <= set(masks):
                del self._prepared[shape]
                gone |= prepared.keys
            prepared.dispatchers.difference_update(masks)
        with DEVICE, torch.cuda.device_of(self.plain):
            self._evict([key for key in self._graphs if key in gone - self._needed()])

    def run(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        first = None if self._now is None else self.layout.first(max(self._now.start, start))
        return self._run(first, x, start, stop)

    def _run(self, first: int | None, x: Tensor, start: int, stop: int | None = None) -> Tensor:
        """``run``, with the weights of units from ``first`` on in the buffer."""
        run = super().run

        def function(x: Tensor) -> Tensor:
            with self._aimed(first):
                return run(x, start, stop)

        parts = [self._replay((first, start, stop), function, part) for part in x.split(self._most)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def run_each(self, x: Tensor, masks: Sequence[Mask], start: int, stop: int | None = None) -> Tensor:
        """Run stages ``start`` to ``stop``, image n under ``masks[n]``; afterwards the plain backbone is active.

        For few images per mask: if many share a mask, ``swap`` and ``run`` cost less. No weights are materialized,
        except for masks that are 1-bit deltas, or that change more than the layers.

        Args:
            x: features at ``start``, [N, ...].
            masks: packed, N of them; each begins at ``start`` or before.

        Returns:
            the same as ``run``.
        """
        packed = [mask for mask in masks if isinstance(mask, PackedMask)]
        assert len(packed) == len(masks) == len(x) and all(mask.start <= start for mask in packed)
        self.swap(None)
        alone = [self._distinct is None or bool(mask.loose) or mask.steps.numel() > 0 for mask in packed]
        together = [row for row, each in enumerate(alone) if not each]
        if len({packed[row] for row in together}) < 2:
            together = []
        if len(together) == len(x):
            return self._run_each(x, packed, start, stop)
        groups: dict[PackedMask, list[int]] = {}
        for row in sorted({*range(len(x))} - {*together}):
            groups.setdefault(packed[row], []).append(row)
        order = [row for rows in (*groups.values(), together) for row in rows]
        x = x.index_select(0, upload(order, x.device))
        *parts, rest = x.split([*map(len, groups.values()), len(together)])
        results = []
        for mask, part in zip(groups, parts, strict=True):
            self.swap(mask)
            results.append(self.run(part, start, stop))
        self.swap(None)
        if together:
            results.append(self._run_each(rest, [packed[row] for row in together], start, stop))
        back = sorted(range(len(order)), key=order.__getitem__)
        return torch.cat(results).index_select(0, upload(back, x.device))

    def _run_each(self, x: Tensor, masks: Sequence[PackedMask], start: int, stop: int | None) -> Tensor:
        parts = []
        for begin, images in zip(range(0, len(x), self._most), x.split(self._most), strict=True):
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

    def _replay(self, key: tuple[Any, ...], function: Callable[..., Tensor], x: Tensor, *others: Tensor) -> Tensor:
        """Replay or capture a function of ``x``, at most a bucket of images, and of other inputs of full bucket size.

        The key begins with the first unit whose weights come from the buffer, or None.
        """
        bucket, key = _bucket(len(x)), _key(key, x)
        # A graph is captured, and launched, on the current device.
        with torch.inference_mode(), DEVICE, torch.cuda.device_of(self.plain):
            if key not in self._graphs:
                place = x.new_zeros((bucket, *x.shape[1:]), dtype=self.dtype)
                place = place.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else place
                inputs = [place, *(t.clone() for t in others)]
                with products(self.tf32, self.plain.device):
                    self._graphs[key] = Graph(function, inputs, self._stream, self._pool)
                needed = self._needed()
                self._evict([key for key in self._graphs if key not in needed][:-GRAPHS])
            self._graphs.move_to_end(key)
            return self._graphs[key](x, *others)

    def _needed(self) -> set[tuple[Any, ...]]:
        """Keys of the graphs that bundles have prepared."""
        return set().union(*(prepared.keys for prepared in self._prepared.values()))

    def _evict(self, keys: Sequence[tuple[Any, ...]]) -> None:
        """Free graphs. The device, which the caller holds, is idle afterwards: one of them may be running."""
        if keys and self.plain.is_cuda:
            torch.cuda.synchronize()
        for key in keys:
            del self._graphs[key]
        if keys and not self._graphs and self.plain.is_cuda:  # PyTorch takes no pool that nothing uses any more
            self._pool = torch.cuda.graph_pool_handle()

    def _fill(self, mask: PackedMask) -> None:
        """Write a mask's weights, shifts and loose tensors where the graphs read them."""
        first = self.layout.first(mask.start)
        self.materialize(mask, self._buffer[self.layout.begin[first] :])
        self._shifts[self.layout.row[first] :].copy_(mask.shifts)
        if names := [*self._changed | mask.loose.keys()]:  # also those that only the last mask changed
            values = [mask.loose.get(name, self.layout.loose[name]) for name in names]
            torch._foreach_copy_([self._loose[name] for name in names], values)
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


def _key(parts: tuple[Any, ...], x: Tensor) -> tuple[Any, ...]:
    """The key of a graph for a batch of this shape."""
    return (*parts, _bucket(len(x)), x.shape[1:])
