"""Ways to serve N adapted models. Each is built in a separate process and answers (model, image) pairs.

Each may first group a batch by model; none looks beyond the batch.
"""

import tempfile
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks import synthetic
from cascade.engine.executors.onnx import export, library, session_options
from cascade.engine.executors.selection import Kind, choose
from cascade.engine.weight_cache import WeightCache
from cascade.kernels.materialize import materialize
from cascade.kernels.weight_layout import BlockOrder, WeightLayout
from cascade.model import masks
from cascade.model.backbone import Backbone
from cascade.model.folding import Folded
from cascade.model.masks import Mask

Batch = list[int]  # the model of each image
Answer = Callable[[Batch], object]


def ours(name: str, models: int, held: int, executor: Kind = "auto") -> Answer:
    """Packed masks over one backbone, at most ``held`` of them materialized."""
    backbone = synthetic.load(name)
    pixels, size = synthetic.noise(backbone, 64), synthetic.mask_bytes(backbone)
    engine = synthetic.engine_of([synthetic.single(backbone, str(i), i) for i in range(models)], held * size, executor)

    def answer(batch: Batch) -> dict[str, int]:
        engine.run([synthetic.item(engine, str(model), pixels[i % 64]) for i, model in enumerate(batch)])
        return engine.stats()

    return answer


def unmasked(name: str, executor: Kind = "auto") -> Answer:
    """The unmasked backbone in one of our executors, whichever model is requested."""
    backbone = synthetic.load(name)
    pixels = synthetic.noise(backbone, 64)
    chosen = choose(backbone, WeightCache(0), executor)
    return grouped(lambda wanted, x: chosen.run(x), pixels)


def static_copies(name: str, models: int) -> Answer:
    """A static ONNX Runtime session for each model, the fastest executor of copies."""
    backbone = synthetic.load(name)
    pixels = synthetic.noise(backbone, 64)
    sessions = [static_session(backbone, synthetic.mask(backbone, "", 0, i), pixels) for i in range(models)]

    def run(model: int, x: Tensor) -> Any:
        return sessions[model].run(None, {"x": x.numpy()})[0]

    return grouped(run, pixels)


def files(name: str, models: int) -> Answer:
    """One resident model that loads a state_dict from disk (page cache) whenever the model changes."""
    backbone = synthetic.load(name)
    pixels = synthetic.noise(backbone, 64)
    keep = tempfile.TemporaryDirectory(prefix="cascade-files-")
    for i in range(models):
        save_file(
            copy_of(backbone, synthetic.mask(backbone, "", 0, i)).state_dict(), Path(keep.name, f"{i}.safetensors")
        )
    model, now = copy_of(backbone, synthetic.mask(backbone, "", 0, 0)), [-1]

    def run(wanted: int, x: Tensor, keep: object = keep) -> Any:  # the folder goes when the process ends
        if now[0] != wanted:
            model.load_state_dict(load_file(Path(keep.name, f"{wanted}.safetensors")))  # type: ignore[attr-defined]
            now[0] = wanted
        return model(x.contiguous(memory_format=torch.channels_last))

    return grouped(run, pixels)


def hooks(name: str, models: int) -> Answer:
    """Forward hooks that multiply each layer's weight by its mask on the fly; masks are bool tensors."""
    backbone = synthetic.load(name)
    pixels, model = synthetic.noise(backbone, 64), deepcopy(backbone.model)
    active = []
    for i in range(models):
        bits = synthetic.mask(backbone, "", 0, i).bits
        active.append(masks.unpack(bits, backbone.weights.numel()))
    now = [0]
    for parameter, (begin, end) in backbone.spans.items():
        path, _, part = parameter.rpartition(".")
        module, pristine = model.get_submodule(path), dict(backbone.model.named_parameters())[parameter]

        def hook(
            module: nn.Module,
            inputs: Any,
            part: str = part,
            pristine: Tensor = pristine,
            span: slice = slice(begin, end),
        ) -> None:
            mask = active[now[0]][span].view(pristine.shape)
            getattr(module, part).data = pristine * mask / mask.float().mean().sqrt()

        module.register_forward_pre_hook(hook)

    def run(wanted: int, x: Tensor) -> Any:
        now[0] = wanted
        return model(x.contiguous(memory_format=torch.channels_last))

    return grouped(run, pixels)


def eager(name: str, layout: str) -> Answer:
    """The unmasked timm model, with contiguous or channels-last images."""
    backbone = synthetic.load(name)
    pixels, model = synthetic.noise(backbone, 64), backbone.model
    last = layout == "channels_last"

    def run(wanted: int, x: Tensor) -> Any:
        return model(x.contiguous(memory_format=torch.channels_last) if last else x)

    return grouped(run, pixels)


def grouped(run: Callable[[int, Tensor], Any], pixels: Tensor) -> Answer:
    """Yield the images of a batch, grouped by model."""

    def answer(batch: Batch) -> None:
        groups: dict[int, list[int]] = {}
        for i, model in enumerate(batch):
            groups.setdefault(model, []).append(i % len(pixels))
        with torch.inference_mode():
            for model, rows in groups.items():
                run(model, pixels[rows])

    return answer


def copy_of(backbone: Backbone, mask: Mask) -> nn.Module:
    """A full model with the mask's weights and statistics."""
    model = deepcopy(backbone.model)
    flat, parameters = materialize(backbone, mask), dict(model.named_parameters())
    for name, (begin, end) in backbone.spans.items():
        parameters[name].data = flat[begin:end].view(parameters[name].shape).clone()
    model.load_state_dict(mask.norms, strict=False)
    return model


def static_session(backbone: Backbone, mask: Mask, pixels: Tensor) -> Any:
    """BatchNorm folded and weights constant, so that ONNX Runtime may reorder them."""
    onnxruntime = library("onnxruntime")
    folded = Folded(backbone)
    flat = WeightLayout(
        folded, [BlockOrder(1, torch.arange(u.columns, dtype=torch.int32).numpy()) for u in folded.units]
    )
    packed = flat.pack(mask)
    weights = flat.materialize(packed)
    for i, unit in enumerate(folded.units):
        layer, begin, row = folded.model.get_submodule(unit.module), int(flat.begin[i]), int(flat.row[i])
        own = weights[begin : begin + unit.rows * unit.columns].view(unit.shape).clone()
        layer.weight = nn.Parameter(own, requires_grad=False)
        layer.bias = nn.Parameter(packed.shifts[row : row + unit.rows].clone(), requires_grad=False)
    options = session_options(onnxruntime, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL)
    return onnxruntime.InferenceSession(export(folded.model, pixels[:2]), options, providers=["CPUExecutionProvider"])
