"""ONNX Runtime's side of its executor: the provider for a device, and sessions whose tensors are bound where they are.

Images, weights and features stay on the device: none of them passes through the host, except in a session's first run.
"""

import os
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from cascade import extras
from cascade.engine.executors.precision import DEVICE
from cascade.errors import CascadeError
from cascade.kernels.weight_layout import BlockOrder, WeightLayout
from cascade.model.backbone import Backbone

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
BINDINGS = 64  # kept per session, about ten kB each


class OnnxError(CascadeError):
    """ONNX Runtime can't run this backbone, or is not installed; the PyTorch executors run everything."""


@dataclass(frozen=True)
class Provider:
    """Where ONNX Runtime runs ("execution provider").

    Attributes:
        name: CPU or CUDA. options: for it.
        reorders: whether it reorders weights for its kernels, which it only does with constants.
        stream: the CUDA stream of its work.
    """

    name: str = CPU
    options: dict[str, str] = field(default_factory=dict)
    reorders: bool = True
    stream: Any = None


def provider_of(device: torch.device) -> Provider:
    """The provider for a device."""
    if device.type != "cuda":
        return Provider()
    stream = torch.cuda.Stream(device)
    options = {
        "device_id": str(device.index or 0),
        "user_compute_stream": str(stream.cuda_stream),
        "use_tf32": "0",  # exact, like every executor in float32
        "cudnn_conv_algo_search": "HEURISTIC",  # no trials: requests would wait for them at each new batch size
        "arena_extend_strategy": "kSameAsRequested",
    }
    return Provider(CUDA, options, reorders=False, stream=stream)


@dataclass(frozen=True, eq=False)
class Graph:
    """A graph with its units' weights as inputs.

    Attributes:
        model: the ONNX model's bytes.
        orders: of its units, in the units' order. first: index of the first unit.
        shapes: of every input except the image, by name: ``weight.INDEX``, ``shift.INDEX`` or a loose tensor's name.
    """

    model: bytes
    orders: list[BlockOrder]
    first: int
    shapes: dict[str, list[int]]


class Pointed(Protocol):
    """What a session needs of its executor: where the current mask's tensors are, as (tensor, offset) by unit."""

    backbone: Backbone
    provider: Provider
    layout: WeightLayout
    place: list[tuple[Tensor, int]]
    shift: list[tuple[Tensor, int]]
    loose: dict[str, Tensor]

    @property
    def pointing(self) -> Hashable:
        """Changes with any of them."""


class Session:
    """A session of one graph; it runs under the executor's current mask."""

    def __init__(self, graph: Graph, executor: Pointed) -> None:
        name = executor.backbone.name
        for i, order in enumerate(graph.orders, graph.first):
            own = executor.layout.orders[i]
            if order.block != own.block or not np.array_equal(order.columns, own.columns):
                raise OnnxError(f"{name}: ONNX Runtime orders a layer's weights in two ways")
        self._session = _open(graph.model, executor.provider, name)
        self._row: torch.Size | None = None  # shape of an image's output
        self._options = library("onnxruntime").RunOptions()
        # ``_queued`` orders the work, so the host need not wait for it.
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._shapes = graph.shapes
        self._executor: Pointed = weakref.proxy(executor)  # which holds its sessions, and frees them with itself
        self._bindings: OrderedDict[Hashable, Any] = OrderedDict()

    def run(self, x: Tensor) -> Tensor:
        x, binding = x.detach().float().contiguous(), self._bound()
        place = x.device.type, x.device.index or 0, np.float32
        binding.bind_input("x", *place, x.shape, x.data_ptr())
        if self._row is None:  # not every graph tells it, so the first output comes through the host
            binding.bind_output("y")
            with self._queued(x.device):
                self._session.run_with_iobinding(binding)
            y = torch.from_numpy(binding.copy_outputs_to_cpu()[0]).to(x.device)
            self._row = y.shape[1:]
            return y
        y = x.new_empty(len(x), *self._row)
        binding.bind_output("y", *place, y.shape, y.data_ptr())
        with self._queued(x.device):
            self._session.run_with_iobinding(binding, self._options)
        return y

    def _bound(self) -> Any:
        """Bind all inputs except the images; cached for a few masks, since binding takes half a millisecond."""
        executor, key = self._executor, self._executor.pointing
        if key in self._bindings:
            self._bindings.move_to_end(key)
            return self._bindings[key]
        binding = self._session.io_binding()
        for name, shape in self._shapes.items():
            kind, _, index = name.partition(".")
            places = {"weight": executor.place, "shift": executor.shift}.get(kind)
            tensor, offset = places[int(index)] if places else (executor.loose[name], 0)
            pointer = tensor.data_ptr() + 4 * offset
            binding.bind_input(name, tensor.device.type, tensor.device.index or 0, np.float32, shape, pointer)
        self._bindings[key] = binding
        if len(self._bindings) > BINDINGS:
            self._bindings.popitem(last=False)
        return binding

    @contextmanager
    def _queued(self, device: torch.device) -> Iterator[None]:
        """Queue work behind PyTorch's, and PyTorch's next work behind it; the host waits for neither."""
        stream = self._executor.provider.stream
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(device))
        yield
        if stream is not None:
            torch.cuda.current_stream(device).wait_stream(stream)


def _open(model: bytes, provider: Provider, name: str) -> Any:
    """A session on this provider; elsewhere ONNX Runtime would go on without it, on the CPU."""
    onnxruntime = library("onnxruntime")
    if provider.name not in onnxruntime.get_available_providers():
        raise OnnxError(f"this ONNX Runtime has no {provider.name}: pip install 'cascade-vision[gpu]'")
    levels = onnxruntime.GraphOptimizationLevel  # reordering is an optimization, which was done already
    options = session_options(onnxruntime, levels.ORT_DISABLE_ALL if provider.reorders else levels.ORT_ENABLE_ALL)
    try:
        with DEVICE:
            chosen = [(provider.name, provider.options)]
            session = onnxruntime.InferenceSession(model, options, providers=chosen, enable_fallback=0)
    except Exception as error:  # its exceptions have no common base
        raise OnnxError(f"{name}: ONNX Runtime can't run it: {error}") from error
    if session.get_providers()[0] != provider.name:
        raise OnnxError(f"ONNX Runtime can't load its {provider.name}; its own message says which library is missing")
    return session


def session_options(onnxruntime: Any, level: Any) -> Any:
    """Options of a session: its optimization level, torch's number of threads, and no spinning."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    # Threads that spin while waiting take cores away from other work, such as a swap or another session.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def library(name: str) -> Any:
    """Import onnx or onnxruntime. Raises OnnxError, which names the extra to install."""
    # Since 1.29 ONNX Runtime sends telemetry and stores an identifier on disk, unless this is set before the import.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    try:
        return extras.library(name)
    except extras.ExtraError as error:
        raise OnnxError(str(error)) from None
