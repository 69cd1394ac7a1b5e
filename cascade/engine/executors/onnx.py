"""ONNX Runtime with the weights as inputs: as fast as a static session, and a mask is a set of pointers.

ONNX Runtime's fast convolutions need weights in blocks of 8 or 16 output channels, and it only reorders weights that
are constants of the graph. So the graph is optimized once with constants whose values are their own positions: where
each value ends up reveals the order (``weight_layout.BlockOrder``). Then the constants become inputs of the optimized
graph, and every mask's weights are written in that order directly. Outputs are identical, no constant depends on a
mask, and sessions take milliseconds to create.

On a GPU nothing is reordered: the constants become inputs first, and each session optimizes its own graph.
"""

import copy
import io
import os
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from cascade.engine.executors import graph_cache, graph_process
from cascade.engine.executors.base import BaseExecutor
from cascade.engine.executors.onnx_session import CPU, Graph, OnnxError, Session, library, provider_of, session_options
from cascade.engine.executors.precision import DEVICE
from cascade.engine.weight_cache import WeightCache
from cascade.kernels.weight_layout import BlockOrder, PackedMask, WeightLayout
from cascade.model.backbone import Backbone
from cascade.model.folding import Folded, Unit
from cascade.model.masks import Mask
from cascade.model.stages import stage_of, stages

# These optimizers would merge a unit's weights with other constants.
_KEEP_APART = ["ConvAddFusion", "ConvMulFusion", "ConvBNFusion"]
_Key = tuple[int, int | None, torch.Size]
"""Of a session: the first stage, the first that does not run, and the shape of an image at the first."""
_Kind = tuple[int, int, int, int]
"""Of a bundle: first stage of its dispatcher and of its experts, size of its images, and stage of its domain."""
_ROWS = 13  # bits of a probe bias that count rows; the others count units, and float32 holds 24 exactly


class OnnxExecutor(BaseExecutor):
    """Runs graphs of the folded model, one per range of stages and input shape.

    Args:
        backbone: the model. weight_cache: materialized weights.

    Raises:
        OnnxError: a library or the device's provider is missing, or the graph can't be bound.
    """

    def __init__(self, backbone: Backbone, weight_cache: WeightCache) -> None:
        self.backbone, self.weight_cache = backbone, weight_cache
        self.provider = provider_of(backbone.weights.device)
        with DEVICE:
            folded = Folded(backbone)
        self._sessions: dict[_Key, Session] = {}
        self._prepared: set[_Kind] = set()
        self._exported: set[_Kind] = set()
        self._exporting = threading.Lock()
        self._shapes: dict[int, list[torch.Size]] = {}
        x = torch.zeros(2, *backbone.config["input_size"])
        graph = _graph(folded, x, 0, None, self.provider.reorders)
        with DEVICE:
            self.layout = WeightLayout(folded, graph.orders)
        self.plain = self.layout.plain
        self._sessions[0, None, x.shape[1:]] = Session(graph, self)
        self.place = [(self.plain, 0)] * len(folded.units)
        self.shift = [(self.layout.shifts, 0)] * len(folded.units)
        self.loose = dict(self.layout.loose)
        self.point(0, self.plain, self.layout.shifts, {})

    def pack(self, mask: Mask) -> PackedMask:
        packed = super().pack(mask)  # on the CPU, which takes a while
        with DEVICE:
            return packed.to(self.plain.device)

    def prefetch(self, mask: Mask) -> None:
        """Start to materialize the next mask's weights; on a GPU that takes microseconds and can wait."""
        if not self.plain.is_cuda:
            super().prefetch(mask)

    def point(self, first: int, weights: Tensor, shifts: Tensor, loose: dict[str, Tensor]) -> None:
        self.loose.update(loose)
        # The bindings' cache key: everything that a session's pointers depend on.
        self.pointing = (first, weights.data_ptr(), shifts.data_ptr(), *(t.data_ptr() for t in self.loose.values()))
        for i in range(first, len(self.place)):
            self.place[i] = weights, int(self.layout.begin[i] - self.layout.begin[first])
            self.shift[i] = shifts, int(self.layout.row[i] - self.layout.row[first])

    def export(self, masks: Sequence[Mask], size: int, domain: int = 0) -> None:
        kind = _kind(masks, size, domain)
        with self._exporting:  # another load may need the same graphs
            if kind in self._exported | self._prepared:
                return
            self._exported.add(kind)  # also if it fails: then ``prepare`` exports them
            folded, reorder = self.layout.folded, self.provider.reorders
            paths = {key: _path(folded, *key, reorder) for key in self._missing(kind)}
            new = [graph_process.Wanted(*key, reorder, str(path)) for key, path in paths.items() if not path.exists()]
            if new:
                graph_process.export(folded, new)

    def prepare(self, masks: Sequence[Mask], size: int, domain: int = 0, batch: int = 32) -> None:
        """Create the sessions for a bundle's masks; exporting a graph takes seconds, and passes continue meanwhile."""
        kind = _kind(masks, size, domain)
        if kind in self._prepared:
            return
        for key in self._missing(kind):
            start, stop, shape = key
            self._sessions[key] = self._session(torch.zeros(1, *shape), start, stop)
        self._prepared.add(kind)

    def _missing(self, kind: _Kind) -> list[_Key]:
        """The keys of the sessions that masks of this kind need, and that do not exist."""
        start, split, size, domain = kind
        ranges: list[tuple[int, int | None]] = [(0, start)] if start else []
        ranges += [*([(start, split)] if split > start else []), (split, None)]
        if domain:
            ranges += [(0, domain), *([(domain, start)] if start > domain else [])]
        keys = [(first, stop, self._shape(first, size)) for first, stop in ranges]
        return [key for key in dict.fromkeys(keys) if key not in self._sessions]

    def _shape(self, stage: int, size: int) -> torch.Size:
        """The shape of an image's activations before a stage."""
        if size not in self._shapes:
            self._shapes[size] = _shapes(self.layout.folded, size)
        return self._shapes[size][stage]

    def run(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        key = start, stop, x.shape[1:]
        if key not in self._sessions:
            self._sessions[key] = self._session(x, start, stop)
        return self._sessions[key].run(x)

    def _session(self, x: Tensor, start: int, stop: int | None) -> Session:
        return Session(_graph(self.layout.folded, x, start, stop, self.provider.reorders), self)


class _Range(nn.Module):
    """Stages ``start`` to ``stop`` of a model; the tensors keep the model's names under ``model.``"""

    def __init__(self, model: nn.Module, start: int, stop: int | None) -> None:
        super().__init__()
        self.model, self.stop = model, stop
        self._stages = stages(model)[start:stop]

    def forward(self, x: Tensor) -> Tensor:
        for stage in self._stages:
            x = stage.run(x)
        return self.model.forward_head(x, pre_logits=True) if self.stop is None else x  # type: ignore[operator]


class _Pointwise(nn.Module):
    """A linear layer as a 1x1 convolution, which ONNX Runtime can store in blocks, unlike a matrix product."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(t, requires_grad=False) for t in (weight[:, :, None, None], bias))

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        flat = x.reshape(shape[0], 1, -1, shape[-1]).permute(0, 3, 1, 2)
        return conv2d(flat, self.weight, self.bias).permute(0, 2, 3, 1).reshape(*shape[:-1], self.weight.shape[0])


def _kind(masks: Sequence[Mask], size: int, domain: int) -> _Kind:
    start = masks[0].start
    return start, min((mask.start for mask in masks[1:]), default=start), size, domain


def _shapes(folded: Folded, size: int) -> list[torch.Size]:
    """Shapes of an image's activations before each stage and after the last, by a pass of zeros.

    Not on PyTorch's meta device: there, a ReLU6 or a ViT would import TorchDynamo, which takes 1.6 s and 150 MB.
    """
    model, x = copy.deepcopy(folded.model).cpu(), torch.zeros(1, 3, size, size)
    for unit in folded.units:
        layer = model.get_submodule(unit.module)
        for part, shape in (("weight", unit.shape), ("bias", unit.shape[:1])):
            setattr(layer, part, nn.Parameter(torch.zeros(shape), requires_grad=False))
    shapes = [x.shape[1:]]
    with torch.inference_mode():
        for stage in stages(model):
            x = stage.run(x)
            shapes.append(x.shape[1:])
    return shapes


def _path(folded: Folded, start: int, stop: int | None, shape: Sequence[int], reorder: bool) -> Path:
    """The file of a graph in the cache."""
    return graph_cache.path_of(folded.backbone.fingerprint, start, stop, list(shape), sorted(folded.loose), reorder)


def _graph(folded: Folded, x: Tensor, start: int, stop: int | None, reorder: bool) -> Graph:
    """The graph of a range of stages, for inputs of this shape and any batch size; made once, then cached."""
    path = _path(folded, start, stop, x.shape[1:], reorder)
    if (parts := graph_cache.read(path)) is None:
        parts = made(folded, x, start, stop, reorder)
        graph_cache.write(path, parts)
    return Graph(*parts)


def made(folded: Folded, x: Tensor, start: int, stop: int | None, reorder: bool = True) -> graph_cache.Parts:
    """Export a graph, optimize it for a CPU if its weights are to be reordered, and turn the weights into inputs."""
    onnx = library("onnx")
    last = len(folded.backbone.stages) if stop is None else stop
    inside = [(i, unit) for i, unit in enumerate(folded.units) if start <= unit.stage < last]
    loose = [f"model.{n}" for n in folded.loose if start <= stage_of(n, folded.backbone.stages) < last]
    exported = onnx.load_model_from_string(
        export(_Range(_probe(folded, inside), start, stop), x[:1].expand(2, *x.shape[1:]))
    )
    _make_inputs(exported, {name: name.removeprefix("model.") for name in loose})
    others = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in exported.graph.input[1:]}
    optimized = _optimized(exported, folded.backbone.name) if reorder else exported
    model, orders, first, shapes = _bound(optimized, inside, folded.backbone.name)
    return model, orders, first, shapes | others


def _optimized(model: Any, name: str) -> Any:
    """The model as the CPU's provider optimizes it, with constants in its kernels' orders."""
    onnx, onnxruntime = library("onnx"), library("onnxruntime")
    optimized = os.memfd_create("optimized")  # ONNX Runtime can only write to a file; this one needs no disk
    try:
        options = session_options(onnxruntime, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL)
        options.optimized_model_filepath = f"/proc/self/fd/{optimized}"
        onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=[CPU], disabled_optimizers=_KEEP_APART
        )
        with open(optimized, "rb", closefd=False) as file:
            return onnx.load_model_from_string(file.read())
    except Exception as error:  # its exceptions have no common base; running out of memory is one of them
        raise OnnxError(f"{name}: ONNX Runtime can't optimize it: {error}") from error
    finally:
        os.close(optimized)


def _make_inputs(model: Any, names: dict[str, str]) -> dict[str, list[int]]:
    """Turn constants of a graph into float32 inputs. names: input names by constant. Returns the inputs' shapes."""
    onnx = library("onnx")
    shapes = {}
    for constant in [c for c in model.graph.initializer if c.name in names]:
        shapes[names[constant.name]] = list(constant.dims)
        model.graph.initializer.remove(constant)
        model.graph.input.append(
            onnx.helper.make_tensor_value_info(names[constant.name], onnx.TensorProto.FLOAT, constant.dims)
        )
    for node in model.graph.node:
        node.input[:] = [names.get(n, n) for n in node.input]
    return shapes


def _probe(folded: Folded, inside: list[tuple[int, Unit]]) -> nn.Module:
    """The folded model with weights that are their own positions: a value v of a weight was at place v - 1 - index.

    Loose tensors get random values, because the exporter merges constants that are equal.
    """
    shared = {id(t): _on_cpu(t) for t in (*folded.model.parameters(), *folded.model.buffers())}
    model = copy.deepcopy(folded.model, shared)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]  # plain products: it fuses them itself
    generator = torch.Generator().manual_seed(0)
    for name in folded.loose:
        path, _, part = name.rpartition(".")
        old = getattr(model.get_submodule(path), part)
        drawn = 0.5 + torch.rand(old.shape, generator=generator)
        new = nn.Parameter(drawn, requires_grad=False) if isinstance(old, nn.Parameter) else drawn
        setattr(model.get_submodule(path), part, new)
    for i, unit in inside:
        size = unit.rows * unit.columns
        if size + i >= 1 << 24 or unit.rows > 1 << _ROWS or i >= 1 << 24 - _ROWS:
            raise OnnxError(f"{folded.backbone.name}: {unit.module} is too large to be probed")
        weight = torch.arange(1, size + 1, dtype=torch.float32) + i
        bias = torch.arange(1, unit.rows + 1, dtype=torch.float32) + float(i << _ROWS)
        layer = model.get_submodule(unit.module)
        if isinstance(layer, nn.Linear):
            parent, _, name = unit.module.rpartition(".")
            setattr(model.get_submodule(parent), name, _Pointwise(weight.view(unit.shape), bias))
        else:
            layer.weight = nn.Parameter(weight.view(unit.shape), requires_grad=False)
            layer.bias = nn.Parameter(bias, requires_grad=False)
    return model


def _on_cpu(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy of one on a GPU: the exporter runs on the CPU."""
    if not tensor.is_cuda:
        return tensor
    with DEVICE:
        copied = tensor.detach().cpu()
    return nn.Parameter(copied, requires_grad=False) if isinstance(tensor, nn.Parameter) else copied


def export(module: nn.Module, x: Tensor) -> bytes:
    """Export a module as an ONNX model with a dynamic batch size."""
    out = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the newer exporter is four times slower and needs one more library
        torch.onnx.export(
            module.eval(),
            (x.cpu(),),
            out,  # type: ignore[arg-type]  # a file is fine, too
            input_names=["x"],
            output_names=["y"],
            dynamic_axes={"x": {0: "batch"}, "y": {0: "batch"}},
            dynamo=False,
            do_constant_folding=False,
            opset_version=17,
        )
    return out.getvalue()


def _bound(model: Any, inside: list[tuple[int, Unit]], name: str) -> graph_cache.Parts:
    """Find the units' constants in the optimized graph by their values, and turn them into inputs."""
    onnx = library("onnx")
    constants = {c.name: c for c in model.graph.initializer}
    orders: dict[int, BlockOrder] = {}
    renamed: dict[str, str] = {}
    units = dict(inside)
    for node in model.graph.node:
        if not node.op_type.endswith("Conv") or len(node.input) < 3 or node.input[2] not in constants:
            continue
        bias = onnx.numpy_helper.to_array(constants[node.input[2]])
        index = int(bias.flat[0]) >> _ROWS
        if index not in units or bias.flat[0] != (index << _ROWS) + 1:
            continue
        weight = onnx.numpy_helper.to_array(constants[node.input[1]])
        orders[index] = _order(units[index], index, weight, bias)
        renamed |= {node.input[1]: f"weight.{index}", node.input[2]: f"shift.{index}"}
    if lost := [unit.module for i, unit in inside if i not in orders]:
        raise OnnxError(f"{name}: ONNX Runtime merged the weights of {lost[0]} with others")
    shapes = _make_inputs(model, renamed)
    return model.SerializeToString(), [orders[i] for i, _ in inside], inside[0][0] if inside else 0, shapes


def _order(unit: Unit, index: int, weight: np.ndarray, bias: np.ndarray) -> BlockOrder:
    """Infer the order in which ONNX Runtime stores a unit's weights from the value at each place."""
    places = weight.reshape(-1).astype(np.int64) - 1 - index  # padding becomes negative
    padding = weight.reshape(-1) == 0
    rows, columns = np.where(padding, -1, places // unit.columns), np.where(padding, -1, places % unit.columns)
    for block in (1, 16, 8):
        groups = -(-unit.rows // block)
        if len(places) % (groups * block) or bias.size not in (unit.rows, groups * block):
            continue
        order = BlockOrder(block, columns.reshape(groups, -1, block)[0, :, 0].astype(np.int32))
        wanted = order.arrange(torch.arange(1, unit.rows * unit.columns + 1).view(unit.rows, unit.columns)).numpy()
        if np.array_equal(wanted, np.where(padding, 0, places + 1)):
            return order
    raise OnnxError(f"{unit.module}: ONNX Runtime keeps its weights in an order that is not known: {rows[:4]}")
