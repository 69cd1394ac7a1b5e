"""CUDA graphs: a function of batches, captured once and replayed without the CPU."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Graph:
    """A captured function; without CUDA it is called instead.

    Args:
        function: of ``inputs``, which it finds at one place every time; it returns one row an image.
        inputs: example batches, all of them as long as the bucket.
        stream: where it is warmed up and captured. Libraries keep a workspace for each stream, so all graphs of an
            executor share one.
        pool: memory that graphs share. They run one after the other, and each result is copied out.

    Attributes:
        bytes: what the capture took from the device, with its inputs.
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
            function(*inputs)  # whatever is compiled, chosen or allocated only once
        torch.cuda.current_stream().wait_stream(stream)
        before = torch.cuda.memory_reserved()
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may decode images and upload them meanwhile.
        with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self._out = function(*inputs)
        self.bytes += max(0, torch.cuda.memory_reserved() - before)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The function's value for these rows, a copy; a bucket that is not full is filled with the first one."""
        count = len(inputs[0])
        for place, given in zip(self._inputs, inputs, strict=True):
            place[: len(given)].copy_(given)
            if len(given) < len(place):
                place[len(given) :].copy_(given[:1].expand_as(place[len(given) :]))
        if self._graph is None:
            return self._function(*self._inputs)[:count].clone()
        self._graph.replay()
        return self._out[:count].clone()
