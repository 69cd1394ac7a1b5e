"""PyTorch with BatchNorm folded and weights channels last, in float32 or bfloat16."""

import copy
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from cascade.engine.executors.base import BaseExecutor
from cascade.engine.weight_cache import WeightCache
from cascade.errors import CascadeError
from cascade.kernels.weight_layout import BlockOrder, PackedMask, WeightLayout
from cascade.model.backbone import Backbone
from cascade.model.folding import Folded, Unit
from cascade.model.masks import Mask
from cascade.model.stages import stages


class FoldedExecutor(BaseExecutor):
    """Runs the folded model; its parameters are views of the plain weights, or of a mask's materialized weights.

    Args:
        backbone: the model. weight_cache: materialized weights.
        dtype: of weights and activations in a pass; masks are applied in float32 and rounded once.

    Raises:
        CascadeError: the processor does not support bfloat16.
    """

    def __init__(self, backbone: Backbone, weight_cache: WeightCache, dtype: torch.dtype = torch.float32) -> None:
        if dtype == torch.bfloat16 and backbone.weights.device.type == "cpu" and not _has_bfloat16():
            raise CascadeError("this processor has no bfloat16: choose another executor")
        self.backbone, self.weight_cache, self.dtype = backbone, weight_cache, dtype
        folded = Folded(backbone)
        self.layout = WeightLayout(folded, [channels_last(unit) for unit in folded.units])
        if dtype != torch.float32:  # tensors that no mask changes; copied, because the backbone keeps its own
            folded.model = copy.deepcopy(folded.model).to(dtype)
            self.layout.shifts = self.layout.shifts.to(dtype)
        self.plain = self.layout.plain.to(dtype)
        self._scratch: Tensor | None = None
        self._row = stages(folded.model)
        self.point(0, self.plain, self.layout.shifts, {})

    def pack(self, mask: Mask) -> PackedMask:
        packed = super().pack(mask)
        loose = {name: t.to(self.dtype) for name, t in packed.loose.items()}
        return replace(packed, shifts=packed.shifts.to(self.dtype), loose=loose)

    def size(self, mask: Mask) -> int:
        return super().size(mask) * self.dtype.itemsize // 4

    def materialize(self, mask: PackedMask, out: Tensor | None) -> Tensor:
        if self.plain.is_cuda and out is None:
            out = self.plain.new_empty(self.size(mask) // self.dtype.itemsize)
        if self.plain.is_cuda or self.dtype == torch.float32:
            return super().materialize(mask, out)
        if self._scratch is None:
            self._scratch = torch.empty_like(self.layout.pristine)
        whole = self.layout.materialize(mask, self._scratch[: super().size(mask) // 4])
        return whole.to(self.dtype) if out is None else out.copy_(whole)

    def point(self, first: int, weights: Tensor, shifts: Tensor, loose: dict[str, Tensor]) -> None:
        flat, model = self.layout, self.layout.folded.model
        for i, unit in enumerate(flat.folded.units[first:], first):
            layer = model.get_submodule(unit.module)
            begin, row = int(flat.begin[i] - flat.begin[first]), int(flat.row[i] - flat.row[first])
            layer.weight.data = _view(weights[begin : begin + unit.rows * unit.columns], unit)
            layer.bias.data = shifts[row : row + unit.rows]
        for name, tensor in loose.items():
            module, _, part = name.rpartition(".")
            getattr(model.get_submodule(module), part).data = tensor

    def run(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        with torch.inference_mode():
            x = x.to(self.dtype)
            x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
            for stage in self._row[start:stop]:
                x = stage.run(x)
            if stop is not None:
                return x
            return self.layout.folded.model.forward_head(x, pre_logits=True).float()  # type: ignore[operator]

    def bytes(self) -> int:
        return super().bytes() + (0 if self._scratch is None else self._scratch.nbytes)


def channels_last(unit: Unit) -> BlockOrder:
    """Row by row; a convolution's columns with the input channel innermost."""
    columns = np.arange(unit.columns, dtype=np.int32)
    if len(unit.shape) == 4:
        columns = columns.reshape(unit.shape[1], -1).T.reshape(-1).copy()
    return BlockOrder(1, columns)


def _view(weight: Tensor, unit: Unit) -> Tensor:
    if len(unit.shape) != 4:
        return weight.view(unit.shape)
    rows, depth, height, width = unit.shape
    return weight.view(rows, height, width, depth).permute(0, 3, 1, 2)


def _has_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
