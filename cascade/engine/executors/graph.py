"""CUDA graphs: a function of batches, captured once and replayed without the CPU."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Graph:
    """A captured function; without CUDA it is called directly.

    Args:
        function: of ``inputs``, which stay at fixed addresses; it returns one row per image.
        inputs: example batches, all as long as the bucket.
        stream: for warm-up and capture. Libraries keep a workspace per stream, so all graphs of an executor share one.
        pool: memory that graphs share. They run one after another, and each result is copied out.

    Attributes:
        bytes: device memory of the capture, including its inputs.
    """

    def __init__(
        self, function: Callable[..., Tensor], inputs: Sequence[Tensor], stream: Any = None, pool: Any = None
    ) -> None:
        self._function, self._inputs, self._graph = function, inputs, None
        self.bytes = sum(t.nbytes for t in inputs)
        if stream is None:
            return
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function(*inputs)  # warm up: compile, tune and allocate what is needed only once
        torch.cuda.current_stream().wait_stream(stream)
        before = torch.cuda.memory_reserved()
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may decode and upload images meanwhile.
        with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self._out = function(*inputs)
        self.bytes += max(0, torch.cuda.memory_reserved() - before)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Copy of the function's result for these rows; an incomplete bucket is padded with the first row."""
        count = len(inputs[0])
        for place, given in zip(self._inputs, inputs, strict=True):
            place[: len(given)].copy_(given)
            if len(given) < len(place):
                place[len(given) :].copy_(given[:1].expand_as(place[len(given) :]))
        if self._graph is None:
            return self._function(*self._inputs)[:count].clone()
        self._graph.replay()
        return self._out[:count].clone()
