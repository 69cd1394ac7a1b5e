"""CUDA: the folded model as graphs that are captured once, for every mask, and for a mask for each image.

A graph replays launches with the addresses that they had. So every swap writes into one working buffer, which stays
where it is: graphs hold for all masks, and a swap is a launch and a copy of the shifts. What takes the time on a GPU is
not the swap but the single launches of a small batch, which a graph puts behind each other without the CPU.
"""

import contextlib
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from cascade.engine.executors.folded import FoldedExecutor
from cascade.engine.weight_cache import WeightCache
from cascade.kernels.per_image import Masks
from cascade.kernels.weight_layout import PackedMask
from cascade.model.backbone import Backbone
from cascade.model.masks import Mask
from cascade.model.stages import stages

BUCKETS = (1, 2, 4, 8, 16, 32)
"""Images that a graph takes; smaller batches are filled up, larger ones cut."""

GRAPHS = 128
"""Graphs that are kept, the last used ones."""


class Graph:
    """A function of batches, captured when it is made; without CUDA it is called instead.

    Args:
        function: of ``inputs``, which it finds at one place every time; it returns one row an image.
        inputs: example batches, all of them as long as the bucket.
        pool: memory that graphs share. They run one after the other, and each result is copied out.
    """

    def __init__(self, function: Callable[..., Tensor], inputs: Sequence[Tensor], pool: Any = None) -> None:
        self._function, self._inputs, self._graph = function, inputs, None
        if inputs[0].is_cuda:
            aside = torch.cuda.Stream(inputs[0].device)
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                function(*inputs)  # whatever is compiled, chosen or allocated only once
            torch.cuda.current_stream().wait_stream(aside)
            self._graph = torch.cuda.CUDAGraph()
            # Other threads may pack masks meanwhile.
            with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
                self._out = function(*inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The function's value for these rows, a copy; what is missing in the bucket is filled with the first one."""
        count = len(inputs[0])
        for place, given in zip(self._inputs, inputs, strict=True):
            place[: len(given)].copy_(given)
            if len(given) < len(place):
                place[len(given) :].copy_(given[:1].expand_as(place[len(given) :]))
        if self._graph is None:
            return self._function(*self._inputs)[:count].clone()
        self._graph.replay()
        return self._out[:count].clone()


class CudaExecutor(FoldedExecutor):
    """The folded model on a GPU; on a CPU the same without kernels and graphs, for tests.

    The weight cache holds one buffer, keyed by the mask whose weights are in it. It covers the stages from the
    earliest start of any mask so far to the end. Who evicts it for another backbone costs this one its graphs.

    Args:
        backbone, weight_cache, dtype: see ``FoldedExecutor``.
    """

    def __init__(self, backbone: Backbone, weight_cache: WeightCache, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(backbone, weight_cache, dtype)
        from cascade.engine.executors.per_image import Bound, distinct_model  # triton takes a moment to come up

        self.layout.loose = {name: t.to(dtype) for name, t in self.layout.loose.items()}
        self._shifts = self.layout.shifts.clone()
        self._loose = {name: t.clone() for name, t in self.layout.loose.items()}
        self._changed: set[str] = set()  # loose tensors that the last mask changed
        self._first = len(self.layout.folded.units)  # the first unit of the buffer
        self._buffer: Callable[[], Tensor | None] = lambda: None  # never owned: evicted weights must be free
        self._last: PackedMask | None = None  # whose weights are in it, as long as the weight_cache holds them
        self._graphs: OrderedDict[tuple[Any, ...], Graph] = OrderedDict()
        self._pool = torch.cuda.graph_pool_handle() if self.plain.is_cuda else None
        masked = self.plain if self.layout.plain is self.layout.pristine else self.layout.pristine.to(dtype)
        self._bound = Bound(masked, kernels=self.plain.is_cuda)
        self._distinct = distinct_model(self.layout, self._bound)
        self._distinct_row = stages(self._distinct) if self._distinct else []

    def swap(self, mask: Mask | None) -> None:
        if mask is self._now:
            return
        self._now = None
        if mask is None:
            return
        assert isinstance(mask, PackedMask), "a mask is packed before it is swapped"
        buffer = self._buffer() if self._last in self.weight_cache else None
        first = self.layout.first(mask.start)
        if buffer is None or first < self._first:
            self._forget()
            buffer, self._first = None, min(first, self._first)
        if mask is not self._last and self._last is not None:
            self.weight_cache.drop(self._last)  # its weights are written over
            self._last = None
        size = int(self.layout.begin[-1] - self.layout.begin[self._first]) * self.dtype.itemsize
        buffer = self.weight_cache.get(mask, size, lambda freed: self._fill(mask, freed if buffer is None else buffer))
        self._buffer = weakref.ref(buffer)
        self._now = self._last = mask

    def prefetch(self, mask: Mask) -> None:
        """Nothing: there is one buffer, and it is in use."""

    def run(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        first = None if self._now is None else self.layout.first(max(self._now.start, start))
        run = super().run

        def function(x: Tensor) -> Tensor:
            with self._aimed(first):
                return run(x, start, stop)

        parts = [self._replay((first, start, stop), function, part) for part in x.split(BUCKETS[-1])]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def run_each(self, x: Tensor, masks: Sequence[Mask], start: int, stop: int | None = None) -> Tensor:
        """Stages ``start`` to ``stop`` with image n under ``masks[n]``; afterwards the plain backbone is in place.

        For few images a mask: where many have the same one, ``swap`` and ``run`` cost less. Masks need not be
        materialized, nor are they by it, unless this is a backbone of which masks change more than its layers.

        Args:
            x: features at ``start``, [N, ...]. masks: packed, N of them; each begins at ``start`` or before.

        Returns:
            as ``run``.
        """
        packed = [mask for mask in masks if isinstance(mask, PackedMask)]
        assert len(packed) == len(masks) == len(x) and all(mask.start <= start for mask in packed)
        self.swap(None)
        alone = self._distinct is None or any(mask.loose or mask.steps.numel() for mask in packed)
        if alone or all(mask is packed[0] for mask in packed):
            return self._one_by_one(x, packed, start, stop)
        parts = []
        for begin in range(0, len(x), BUCKETS[-1]):
            part = list(packed[begin : begin + BUCKETS[-1]])
            part += part[:1] * (_bucket(len(part)) - len(part))
            firsts = [self.layout.first(mask.start) for mask in part]
            begins, rows = ([int(at[first]) for first in firsts] for at in (self.layout.begin, self.layout.row))
            self._bound.masks = Masks(part, begins, rows)
            rest = x[begin : begin + BUCKETS[-1]]
            parts.append(
                self._replay((None, start, stop, "each"), self._each(start, stop), rest, self._bound.masks.table)
            )
        self._bound.masks = None
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def bytes(self) -> int:
        return super().bytes() + self._shifts.nbytes + sum(t.nbytes for t in self._loose.values())

    def _each(self, start: int, stop: int | None) -> Callable[[Tensor, Tensor], Tensor]:
        def function(x: Tensor, table: Tensor) -> Tensor:
            assert self._distinct is not None
            self._bound.table = table
            for stage in self._distinct_row[start:stop]:
                x = stage.run(x)
            return x if stop is not None else self._distinct.forward_head(x, pre_logits=True).float()  # type: ignore[operator]

        return function

    def _one_by_one(self, x: Tensor, masks: Sequence[PackedMask], start: int, stop: int | None) -> Tensor:
        found: dict[int, Tensor] = {}
        for mask in dict.fromkeys(masks):
            rows = [row for row, other in enumerate(masks) if other is mask]
            self.swap(mask)
            found.update(zip(rows, self.run(x[rows], start, stop), strict=True))
        self.swap(None)
        return torch.stack([found[row] for row in range(len(masks))])

    def _replay(self, key: tuple[Any, ...], function: Callable[..., Tensor], x: Tensor, *others: Tensor) -> Tensor:
        """A function of ``x``, at most a bucket of images, and of whole buckets of other things.

        The key begins with the first unit whose weights come from the buffer, None where none do.
        """
        bucket = _bucket(len(x))
        key = (*key, bucket, x.shape[1:])
        with (
            torch.inference_mode(),
            torch.cuda.device_of(self.plain),
        ):  # it is captured, and launched, on the current one
            if key not in self._graphs:
                place = x.new_zeros((bucket, *x.shape[1:]), dtype=self.dtype)
                place = place.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else place
                with _precision():
                    self._graphs[key] = Graph(function, [place, *(t.clone() for t in others)], self._pool)
            self._graphs.move_to_end(key)
            if len(self._graphs) > GRAPHS:
                self._idle()
                self._graphs.popitem(last=False)
            return self._graphs[key](x, *others)

    def _fill(self, mask: PackedMask, buffer: Tensor | None) -> Tensor:
        """A mask's weights, shifts and loose tensors where the graphs look for them."""
        begin, row = self.layout.begin, self.layout.row
        first = self.layout.first(mask.start)
        if buffer is None or buffer.dtype != self.dtype:
            buffer = self.plain.new_empty(int(begin[-1] - begin[self._first]))
        self.materialize(mask, buffer[begin[first] - begin[self._first] :])
        self._shifts[row[first] :].copy_(mask.shifts)
        for name in self._changed | mask.loose.keys():  # also those that only the last mask changed
            self._loose[name].copy_(mask.loose.get(name, self.layout.loose[name]))
        self._changed = set(mask.loose)
        return buffer

    def _forget(self) -> None:
        """The buffer, and the graphs that look at it."""
        if self._last is not None:
            self.weight_cache.drop(self._last)
        self._last, self._buffer = None, lambda: None
        self._idle()
        self._graphs = OrderedDict((key, graph) for key, graph in self._graphs.items() if key[0] is None)

    def _idle(self) -> None:
        """No graph runs any more, so that some may be let go of."""
        if self.plain.is_cuda:
            torch.cuda.synchronize(self.plain.device)

    @contextlib.contextmanager
    def _aimed(self, first: int | None) -> Iterator[None]:
        """The model's parameters from a unit on look at the buffer, for as long as it takes to run or to capture."""
        if first is None:
            yield
            return
        buffer = self._buffer()
        assert buffer is not None, "the buffer of the mask in place is held"
        begin, row = self.layout.begin, self.layout.row
        self.point(first, buffer[begin[first] - begin[self._first] :], self._shifts[row[first] :], self._loose)
        try:
            yield
        finally:
            self.point(first, self.plain[begin[first] :], self.layout.shifts[row[first] :], self.layout.loose)


def _bucket(count: int) -> int:
    return next(bucket for bucket in BUCKETS if bucket >= count)


def _precision() -> contextlib.AbstractContextManager[None]:
    """Convolutions as exact as matrix products: by default float32 and not TF32, see ``kernels.distinct.precision``."""
    exact = torch.get_float32_matmul_precision() == "highest"
    return torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=not exact)
