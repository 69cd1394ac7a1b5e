"""LoRA (Hu et al. 2021) as a baseline: a trained low-rank difference for each frozen weight."""

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from cascade.model.backbone import Backbone
from cascade.model.stages import stage_of, stages
from training.masking import Amp, write
from training.tuned import TunedModel

RANK, SCALE = 8, 2.0


class LowRank(nn.Module):
    """``W + scale * B @ A`` with A [rank, columns] and B [rows, rank]; B starts at zero."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = len(weight), weight[0].numel()
        self.a = nn.Parameter(torch.randn(rank, columns, device=weight.device) / columns**0.5)
        self.b = nn.Parameter(torch.zeros(rows, rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + SCALE * (self.b @ self.a).view_as(weight)


def lora_backbone(backbone: Backbone, start: int, *, rank: int = RANK, amp: Amp = "off") -> TunedModel:
    """Make a trainable copy of ``backbone`` from stage ``start`` on, without depthwise convolutions (no low rank)."""
    model = deepcopy(backbone.model)
    write(backbone, model, backbone.weights, 0, backbone.norms)
    row = stages(model)
    for name in [n for n in backbone.spans if n.endswith(".weight") and stage_of(n, row) >= start]:
        module = model.get_submodule(name.removesuffix(".weight"))
        weight = module.weight
        if isinstance(weight, Tensor) and weight.dim() >= 2 and min(len(weight), weight[0].numel()) > rank:
            parametrize.register_parametrization(module, "weight", LowRank(weight.detach(), rank), unsafe=True)
    return TunedModel(backbone, model, row, start, False, len(row), amp)
