"""The plain PyTorch executor: parameters are views, and a swap points them to the mask's materialized weights."""

from dataclasses import replace

import torch
from torch import Tensor

from cascade.engine.weight_cache import WeightCache
from cascade.kernels.materialize import materialize
from cascade.model.backbone import Backbone
from cascade.model.masks import Mask


class PlainExecutor:
    """Runs stages of a backbone under any of its masks.

    Attributes:
        backbone: the resident one; its pristine flat buffer is never written.
        weight_cache: materialized weights, shared between backbones.
    """

    def __init__(self, backbone: Backbone, weight_cache: WeightCache) -> None:
        self.backbone, self.weight_cache = backbone, weight_cache
        self._norms = {name: _module_of(backbone, name) for name in backbone.norms}
        self._now: Mask | None = None

    def pack(self, mask: Mask) -> Mask:
        """The mask as it is, on the backbone's device."""
        device = self.backbone.weights.device
        return replace(mask, bits=mask.bits.to(device), norms={n: t.to(device) for n, t in mask.norms.items()})

    def bytes(self) -> int:
        """Memory of the resident backbone."""
        return self.backbone.bytes()

    def swap(self, mask: Mask | None) -> None:
        """Put the weights and BatchNorm statistics of ``mask`` in place, from its first stage on.

        Stages before it keep whatever they had: a caller runs a mask from its own first stage only.
        """
        if mask is self._now:
            return
        self._release()
        if mask is None:
            return
        first = self.backbone.offset(mask.start)
        flat = self.weight_cache.get(mask, self.size(mask), lambda out: materialize(self.backbone, mask, out))
        self.backbone.point(flat, first)
        for name, tensor in mask.norms.items():
            self._set_norm(name, tensor)
        self._now = mask

    def prefetch(self, mask: Mask) -> None:
        """Begin with the weights of the mask that comes next."""
        self.weight_cache.prefetch(mask, self.size(mask), lambda out: materialize(self.backbone, mask, out))

    def size(self, mask: Mask) -> int:
        """Bytes of the mask's materialized weights."""
        return self.backbone.weights[self.backbone.offset(mask.start) :].nbytes

    def run(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """``Backbone.run`` without autograd, channels last: twice as fast on a CPU, whatever the weights' layout."""
        with torch.inference_mode():
            x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
            return self.backbone.run(x, start, stop)

    def _release(self) -> None:
        """Back to the plain backbone; so no parameter keeps evicted weights alive."""
        if self._now is not None:
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
