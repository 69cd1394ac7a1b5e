"""Export a bundle as a plain model for use without Cascade: a timm checkpoint, an ONNX file or a TorchScript program.

The adapter is applied to the weights. Fusion and linear head are both affine, so they become one classifier.
"""

import json
import warnings
from pathlib import Path
from typing import Literal

import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from cascade import atomic
from cascade.bundle.format import Bundle, BundleError, check, read
from cascade.kernels.materialize import materialize_plain
from cascade.model import backbone as backbones
from cascade.model.backbone import Backbone
from cascade.model.fusion import Identity

Target = Literal["timm", "onnx", "torchscript"]


class Probabilities(nn.Module):
    """A model that outputs class probabilities, like the engine; features if it has no classifier."""

    def __init__(self, model: nn.Module, classes: int) -> None:
        super().__init__()
        self.model, self.classes = model, classes

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model(x)
        return out.softmax(dim=1) if self.classes else out


def export(path: Path, out: Path, to: Target = "timm", weights: Path | None = None, *, larger: bool = False) -> Path:
    """Write the bundle at ``path`` as a plain model to the file ``out``, atomically.

    Of two input sizes this is the smaller one, or with ``larger`` the larger one: a plain model can't defer.

    ``timm`` is a safetensors file for ``timm.create_model(name, num_classes=len(classes))``; its metadata holds the
    name, the classes and the preprocessing. ``onnx`` and ``torchscript`` map ``x``, float32 [N, 3, size, size], to
    probabilities [N, classes]; the ONNX file has the same metadata.

    Raises:
        BundleError: the bundle has experts, or does not fit its backbone, or has no larger size; or ``out`` exists.
    """
    if out.exists():
        raise BundleError(f"{out} exists: choose another name")
    bundle = read(path)
    if larger:
        if bundle.larger is None:
            raise BundleError(f"{path} has only one input size: omit --larger")
        bundle = bundle.larger
    model = plain_model(bundle, weights)
    card = bundle.card
    metadata = {
        "architecture": card.backbone.name,
        "classes": json.dumps(card.classes if bundle.linear else []),
        "preprocessing": json.dumps(card.preprocessing),
    }
    x = torch.zeros(2, 3, bundle.preprocessing.size, bundle.preprocessing.size)
    with atomic.file(out) as temporary, torch.no_grad():
        if to == "timm":
            state = {n: t.contiguous() for n, t in model.state_dict().items()}
            temporary.write_bytes(safetensors.torch.save(state, metadata))
            return out
        if hasattr(model, "set_input_size"):  # a ViT's position embedding is resampled here, not in each pass
            model.set_input_size(img_size=bundle.preprocessing.size)  # type: ignore[operator]
        exported = Probabilities(model, len(card.classes) if bundle.linear else 0).eval()
        if to == "torchscript":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # TorchScript is deprecated, but was requested
                torch.jit.save(torch.jit.trace(exported, x), str(temporary), _extra_files=metadata)
            return out
        _write_onnx(exported, x, temporary, metadata)
    return out


def plain_model(bundle: Bundle, weights: Path | None = None) -> nn.Module:
    """A timm model with the bundle's adapter and classifier in its weights, in eval mode.

    Raises:
        BundleError: the bundle has experts, which do not fit into one plain model.
    """
    if bundle.experts:
        raise BundleError(
            f"{bundle.name}/{bundle.version} has experts: only a bundle with a single adapter can become a plain model"
        )
    want = bundle.card.backbone
    backbone = backbones.load(want.name, want.source, weights)
    check(bundle, backbone)
    head = bundle.linear.get("dispatcher")
    model = timm.create_model(want.name, num_classes=len(bundle.card.classes) if head else 0).eval()
    state = adapted(backbone, bundle)
    if head is not None:
        weight, bias, fusion = head.weight.float(), head.bias, bundle.fusions["dispatcher"]
        if not isinstance(fusion, Identity):
            bias = bias + weight @ fusion.bias.flatten()
            weight = weight @ fusion.weight[0].float().T
        (classifier,) = {n.rpartition(".")[0] for n in model.state_dict().keys() - state.keys()}
        state |= {f"{classifier}.weight": weight, f"{classifier}.bias": bias}
    model.load_state_dict(state)
    return model


def adapted(backbone: Backbone, bundle: Bundle) -> dict[str, Tensor]:
    """The backbone's state dict with the dispatcher's adapter applied."""
    mask = bundle.dispatcher
    state = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    first = backbone.offset(mask.start)
    flat = materialize_plain(backbone, mask, torch.empty_like(backbone.weights[first:]))
    for name, (begin, end) in backbone.spans.items():
        if begin >= first:
            state[name] = flat[begin - first : end - first].view(state[name].shape).clone()
    return state | mask.norms | {name: tensor.float() for name, tensor in mask.channels.items()}


def _write_onnx(model: nn.Module, x: Tensor, file: Path, metadata: dict[str, str]) -> None:
    """Write an ONNX file with a dynamic batch size."""
    import onnx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from the tracer, and about the newer exporter
        axes = {"x": {0: "batch"}, "y": {0: "batch"}}
        names = {"input_names": ["x"], "output_names": ["y"], "dynamic_axes": axes}
        torch.onnx.export(model, (x,), str(file), dynamo=False, opset_version=17, **names)  # type: ignore[arg-type]
    stored = onnx.load(str(file))
    onnx.helper.set_model_props(stored, metadata)
    onnx.save(stored, str(file))
