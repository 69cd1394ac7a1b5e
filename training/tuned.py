"""A copy of a backbone of which every weight is trained, for the loop that trains masks."""

from collections.abc import Iterator
from copy import deepcopy

import torch
from torch import nn

from cascade.model.backbone import Backbone
from cascade.model.stages import stage_of, stages
from training.masking import Amp, MaskedModel, write


class TunedModel(MaskedModel):
    """A copy of a backbone in which all parameters from stage ``start`` on are trained."""

    @property
    def groups(self) -> dict[str, dict[str, nn.Parameter]]:
        return {"weights": {n: p for n, p in self.model.named_parameters() if p.requires_grad}}

    def active(self) -> float:
        return 1.0

    def sparse(self, below: float) -> Iterator[tuple[str, float]]:
        return iter(())


def tune_backbone(
    backbone: Backbone, start: int, *, train_norms: bool = True, amp: Amp = "off", stop: int | None = None
) -> TunedModel:
    """Make a trainable copy of ``backbone``; stages before ``start``, and from ``stop`` on, stay frozen."""
    model = deepcopy(backbone.model)
    write(backbone, model, backbone.weights, 0, backbone.norms)
    model.to(memory_format=torch.channels_last)  # twice as fast on a CPU
    row = stages(model)
    stop = len(row) if stop is None else stop
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(start <= stage_of(name, row) < stop)
    return TunedModel(backbone, model, row, start, train_norms, stop, amp)
