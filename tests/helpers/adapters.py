"""Adapters with random bits and random trained channels, and the reference that writes them into a model by hand."""

import torch
from torch import Tensor

from cascade.kernels.materialize import materialize_plain
from cascade.model import backbone as backbones
from cascade.model.backbone import Backbone
from cascade.model.masks import Mask, all_ones, pack
from tests.helpers.bundles import random_mask

NETWORKS = ("test_resnet", "test_vit", "test_efficientnet")


def random_channels(backbone: Backbone, start: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Trained values for each channel parameter from stage ``start`` on: scales near 1, shifts near 0."""
    channels = {}
    for name, shape in backbone.channels(start).items():
        drawn = torch.rand(shape, generator=generator)
        channels[name] = (drawn + 0.5 if name.endswith(("weight", "gamma")) else drawn - 0.5).half()
    return channels


def random_deltas(backbone: Backbone, start: int, generator: torch.Generator) -> dict[str, Tensor]:
    """A delta for each output channel, as large as the weights."""
    return {n: (torch.rand(rows, generator=generator) / 10).half() for n, rows in backbone.rows(start).items()}


def adapters(backbone: Backbone, start: int, seed: int = 0) -> dict[str, Mask]:
    """One adapter of each kind that begins at stage ``start``."""
    generator = torch.Generator().manual_seed(seed)
    n = backbone.weights.numel() - backbone.offset(start)
    bits = pack(torch.rand(n, generator=generator) < 0.9)
    norms = random_mask(backbone, "", start, generator, norms=True).norms
    channels = random_channels(backbone, start, generator)
    return {
        "mask": Mask("m", start, bits, norms),
        "mask+channels": Mask("m", start, bits, norms, channels),
        "some channels": Mask("m", start, bits, {}, dict([*channels.items()][::3])),
        "channels": Mask("m", start, all_ones(n), {}, channels),
        "delta": Mask("m", start, bits, norms, channels, random_deltas(backbone, start, generator)),
        "delta alone": Mask("m", start, bits, deltas=random_deltas(backbone, start, generator)),
        "frozen": Mask("m", len(backbone.stages), all_ones(0)),
    }


@torch.inference_mode()
def reference(backbone: Backbone, mask: Mask, x: Tensor) -> Tensor:
    """Features [N, F] of a fresh model with the adapter's values in its state dict."""
    own = backbones.load(backbone.name, backbone.source)
    own.model.load_state_dict(backbone.model.state_dict())
    first = own.offset(mask.start)
    own.point(materialize_plain(backbone, mask, torch.empty_like(backbone.weights[first:])), first)
    state = own.model.state_dict()
    for name, tensor in (mask.norms | mask.channels).items():
        state[name].copy_(tensor)
    return own.model(x)
