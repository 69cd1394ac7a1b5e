"""The context coder gives back what it took, and comes near the entropy of what it knows."""

import numpy as np
import pytest
import torch

from cascade import backbone as backbones
from cascade.backbone import Backbone
from training.experiments import context


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return backbones.load("test_resnet", "random:0")


@pytest.mark.parametrize("way", context.WAYS)
@pytest.mark.parametrize("start", [0, 3])
def test_round_trip(backbone: Backbone, way: str, start: int) -> None:
    layout = context.Layout.of(backbone, start, **context.WAYS[way])
    n = backbone.flat.numel() - backbone.offset(start)
    generator = torch.Generator().manual_seed(0)
    known = torch.rand(n, generator=generator) < 0.9
    own = known ^ (torch.rand(n, generator=generator) < 0.05)
    for bits in (own, torch.ones(n, dtype=torch.bool), torch.zeros(n, dtype=torch.bool)):
        assert torch.equal(context.decode(context.encode(bits, layout), layout), bits)
        assert torch.equal(context.decode(context.encode(bits, layout, known), layout, known), bits)


def test_it_uses_what_it_knows(backbone: Backbone) -> None:
    """Small weights off, large ones on but for noise: by tensor there is much to send, by |W| little."""
    weight, generator = backbone.flat.abs(), torch.Generator().manual_seed(0)
    bits = torch.ones(len(weight), dtype=torch.bool)
    for segment in backbone.segments:
        part = weight[segment.offset : segment.end]
        bits[segment.offset : segment.end] = part > part.quantile(0.25)
    known = bits ^ (torch.rand(len(bits), generator=generator) < 0.02)
    size: dict[str, float] = {}
    for way, options in context.WAYS.items():
        layout = context.Layout.of(backbone, 0, **options)
        size[way] = 8 * len(context.encode(bits, layout)) / len(bits)
        size[f"{way}, known"] = 8 * len(context.encode(bits, layout, known)) / len(bits)

    def entropy(p: float) -> float:
        return float(-p * np.log2(p) - (1 - p) * np.log2(1 - p))

    assert size["tensor"] == pytest.approx(entropy(0.25), abs=0.05)
    assert size["channel and |W|"] < 0.2 * size["tensor"]
    assert size["tensor, known"] < entropy(0.02) + 0.05
