"""The plain PyTorch executor: parameters are views, and a swap points them at the mask's materialized weights.

It puts an adapter's values into the model unchanged, without folding, so other executors are tested against it.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cascade.engine.executors.precision import Precision, exact
from cascade.engine.weight_cache import WeightCache
from cascade.kernels.materialize import materialize
from cascade.model.backbone import Backbone
from cascade.model.masks import Mask


class PlainExecutor:
    """Runs stages of a backbone under any of its masks.

    Attributes:
        backbone: the resident one; its pristine flat buffer is never written.
        weight_cache: materialized weights, shared between backbones.
        precision: of the passes.
    """

    kind = "plain"
    error = 0.0

    def __init__(self, backbone: Backbone, weight_cache: WeightCache) -> None:
        self.backbone, self.weight_cache = backbone, weight_cache
        self.precision: Precision = exact
        self._norms = {name: _module_of(backbone, name) for name in backbone.norms}
        self._parameters = dict(backbone.model.named_parameters())
        self._pristine: dict[str, Tensor] = {}  # of the parameters that the current mask replaces with trained values
        self._now: Mask | None = None

    def pack(self, mask: Mask) -> Mask:
        """Move the mask to the backbone's device, with its trained channels in float32."""
        device = self.backbone.weights.device
        norms = {n: t.to(device) for n, t in mask.norms.items()}
        channels = {n: t.float().to(device) for n, t in mask.channels.items()}
        return replace(mask, bits=mask.bits.to(device), norms=norms, channels=channels)

    def export(self, masks: Sequence[Mask], size: int, domain: int = 0) -> None:
        """Do nothing."""

    def prepare(self, masks: Sequence[Mask], size: int, domain: int = 0, batch: int = 32) -> None:
        """Do nothing: the model is ready."""

    def forget(self, masks: Sequence[Mask]) -> None:
        """Do nothing: nothing was built."""

    def bytes(self) -> int:
        """Memory of the resident backbone."""
        return self.backbone.bytes()

    def swap(self, mask: Mask | None) -> None:
        """Apply the weights, BatchNorm statistics and trained channels of ``mask``, from its first stage on.

        Earlier stages are not touched: callers run a mask only from its own first stage on.
        """
        if mask is self._now:
            return
        self._release()
        if mask is None:
            return
        if self.size(mask):
            flat = self.weight_cache.get(mask, self.size(mask), lambda out: materialize(self.backbone, mask, out))
            self.backbone.point(flat, self.backbone.offset(mask.start))
        for name, tensor in mask.norms.items():
            self._set_norm(name, tensor)
        for name, tensor in mask.channels.items():
            self._pristine[name] = self._parameters[name].data
            self._parameters[name].data = tensor.float()
        self._now = mask

    def prefetch(self, mask: Mask) -> None:
        """Start to materialize the weights of the next mask."""
        if self.size(mask):
            self.weight_cache.prefetch(mask, self.size(mask), lambda out: materialize(self.backbone, mask, out))

    def size(self, mask: Mask) -> int:
        """Bytes of the mask's materialized weights."""
        return self.backbone.weights[self.backbone.offset(mask.start) :].nbytes

    def run(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """``Backbone.run`` without autograd, channels last: twice as fast on a CPU, with any layout of the weights."""
        with torch.inference_mode(), self.precision(x.device):
            x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
            x = self.backbone.run(x, start, stop)
            return x if stop is not None else x.float()

    def _release(self) -> None:
        """Restore the plain backbone, so that no parameter keeps evicted weights alive."""
        if self._now is not None:
            for name, tensor in self._pristine.items():
                self._parameters[name].data = tensor
            self._pristine.clear()
            first = self.backbone.offset(self._now.start)
            self.backbone.point(self.backbone.weights[first:], first)
            for name in self._now.norms:
                self._set_norm(name, self.backbone.norms[name])
            self._now = None

    def _set_norm(self, name: str, tensor: Tensor) -> None:
        module, buffer = self._norms[name]
        setattr(module, buffer, tensor)


def _module_of(backbone: Backbone, name: str) -> tuple[torch.nn.Module, str]:
    path, _, buffer = name.rpartition(".")
    return backbone.model.get_submodule(path), buffer
