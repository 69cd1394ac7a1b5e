"""A folded backbone whose layers apply the mask of each image of a batch."""

import copy
from dataclasses import dataclass, field
from typing import cast

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn

from cascade.kernels import per_image
from cascade.kernels.per_image import Layer, Masks
from cascade.kernels.weight_layout import WeightLayout
from cascade.model.folding import Unit


@dataclass
class Bound:
    """The tensors that the layers read in a pass.

    Attributes:
        weights: the plain flat buffer.
        kernels: whether layers run as Triton kernels, or as their plain references.
        masks: of the images.
        table: the masks' addresses, in a tensor that a captured graph reads.
    """

    weights: Tensor
    kernels: bool
    masks: Masks | None = None
    table: Tensor = field(default_factory=lambda: torch.empty(0))


class Distinct(nn.Module):
    """One unit of a folded backbone, which replaces its layer."""

    def __init__(self, layer: Layer, linear: bool, bound: Bound) -> None:
        super().__init__()
        self.layer, self.linear, self.bound = layer, linear, bound

    def forward(self, x: Tensor) -> Tensor:
        weights, masks = self.bound.weights, self.bound.masks
        if self.bound.kernels:
            kernel = per_image.masked_linear if self.linear else per_image.masked_conv
            return kernel(x, weights, self.layer, self.bound.table)
        assert masks is not None
        plain = per_image.masked_linear_plain if self.linear else per_image.masked_conv_plain
        return plain(x, weights, self.layer, masks)


def distinct_model(flat: WeightLayout, bound: Bound) -> nn.Module | None:
    """A copy of the folded model with every unit replaced; everything else is shared.

    None if every mask changes more than the units' weights and biases, or if ``cascade.model.stages`` treats the model
    as a single stage: such a model may read a layer's weight without calling the layer.
    """
    folded = flat.folded
    if folded.always or len(folded.backbone.stages) == 1:
        return None
    shared = {id(t): t for t in (*folded.model.parameters(), *folded.model.buffers())}
    model = copy.deepcopy(folded.model, shared)
    for unit, place, row in zip(folded.units, flat.begin.tolist(), flat.row.tolist(), strict=False):
        module = model.get_submodule(unit.module)
        parent, _, name = unit.module.rpartition(".")
        new = Distinct(layer(unit, module, place, row), isinstance(module, nn.Linear), bound)
        setattr(model.get_submodule(parent), name, new)
    return model


def layer(unit: Unit, module: nn.Module, place: int, row: int) -> Layer:
    """The geometry of a unit, and its place in the flat buffer."""
    if isinstance(module, nn.Linear):
        return Layer(place, row, (*unit.shape, 1, 1))  # type: ignore[arg-type]
    conv = cast(nn.Conv2d, module)
    assert conv.padding_mode == "zeros" and not isinstance(conv.padding, str), f"{unit.module}: padding is not known"
    padding = None if type(conv) is Conv2dSame else (*conv.padding, *conv.padding)
    shape, stride, dilation = unit.shape, conv.stride, conv.dilation
    return Layer(place, row, shape, stride, padding, dilation, conv.groups)  # type: ignore[arg-type]
