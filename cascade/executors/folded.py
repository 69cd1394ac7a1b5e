"""PyTorch with BatchNorm folded and weights channels last: on a CPU faster than the plain model, and on a GPU."""

import numpy as np
import torch
from torch import Tensor, nn

from cascade.backbone import Backbone
from cascade.executors.flat import FlatExecutor
from cascade.flat import Flat, Order
from cascade.fold import Folded, Unit
from cascade.residency import Residency
from cascade.stages import stages


class FoldedExecutor(FlatExecutor):
    """Runs the folded model; its parameters are views of the flat buffer, or of a mask's materialised weights."""

    def __init__(self, backbone: Backbone, residency: Residency) -> None:
        self.backbone, self.residency = backbone, residency
        folded = Folded(backbone)
        self.flat = Flat(folded, [channels_last(unit) for unit in folded.units])
        self._row = stages(folded.model)
        for unit in folded.units:
            layer = folded.model.get_submodule(unit.module)
            layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)
            layer.bias = nn.Parameter(torch.empty(0), requires_grad=False)
        self.point(0, self.flat.pristine, self.flat.shifts, {})

    def point(self, first: int, weights: Tensor, shifts: Tensor, loose: dict[str, Tensor]) -> None:
        flat, model = self.flat, self.flat.folded.model
        for i, unit in enumerate(flat.folded.units[first:], first):
            layer = model.get_submodule(unit.module)
            begin, row = int(flat.begin[i] - flat.begin[first]), int(flat.row[i] - flat.row[first])
            weight = weights[begin : begin + unit.rows * unit.columns]
            layer.weight.data = _view(weight, unit)  # type: ignore[union-attr]
            layer.bias.data = shifts[row : row + unit.rows]  # type: ignore[union-attr]
        for name, tensor in loose.items():
            module, _, part = name.rpartition(".")
            getattr(model.get_submodule(module), part).data = tensor

    def run(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        with torch.inference_mode():
            x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
            for stage in self._row[start:stop]:
                x = stage.run(x)
            return self.flat.folded.model.forward_head(x, pre_logits=True) if stop is None else x  # type: ignore[operator]


def channels_last(unit: Unit) -> Order:
    """Row by row; a convolution's columns with the input channel innermost."""
    columns = np.arange(unit.columns, dtype=np.int32)
    if len(unit.shape) == 4:
        columns = columns.reshape(unit.shape[1], -1).T.reshape(-1)
    return Order(1, np.ascontiguousarray(columns))


def _view(weight: Tensor, unit: Unit) -> Tensor:
    if len(unit.shape) != 4:
        return weight.view(unit.shape)
    rows, depth, height, width = unit.shape
    return weight.view(rows, height, width, depth).permute(0, 3, 1, 2)
