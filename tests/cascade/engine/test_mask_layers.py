"""What a mask switches off by layer: counted in every executor's order, as the bits in the model's order say."""

from dataclasses import replace

import pytest
import torch

from cascade.engine.executors.folded import FoldedExecutor
from cascade.engine.executors.onnx import OnnxExecutor
from cascade.engine.executors.plain import PlainExecutor
from cascade.engine.mask_layers import is_delta, layers
from cascade.engine.weight_cache import WeightCache
from cascade.model import backbone as backbones
from cascade.model.backbone import Backbone
from cascade.model.masks import all_ones, frozen, unpack
from tests.helpers.adapters import adapters
from tests.helpers.bundles import random_mask


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return backbones.load("test_efficientnet", "random:0")


@pytest.mark.parametrize("kind", [PlainExecutor, FoldedExecutor, OnnxExecutor])
def test_as_many_as_the_bits_say(backbone: Backbone, kind: type[PlainExecutor]) -> None:
    executor = kind(backbones.load("test_efficientnet", "random:0"), WeightCache(2**30))
    generator = torch.Generator().manual_seed(0)
    whole, late = (
        random_mask(backbone, name, start, generator) for name, start in (("dispatcher", 0), ("expert-0", 3))
    )
    found = layers(executor, executor.pack(whole), executor.pack(late))
    names = [layer.name for layer in found]
    assert names and {layer.stage for layer in found} == {*range(3, len(backbone.stages))}
    bits = [unpack(m.bits, backbone.weights.numel() - backbone.offset(m.start)) for m in (whole, late)]
    for layer in found:
        begin, end = backbone.spans[layer.name]
        first, second = (
            ~own[begin - backbone.offset(s) : end - backbone.offset(s)] for own, s in zip(bits, (0, 3), strict=True)
        )
        assert layer.weights == end - begin
        expected = (int(first.sum()), int(second.sum()), int((first & second).sum()))
        assert (layer.off, layer.other_off, layer.both_off) == expected
    alone = layers(executor, executor.pack(whole))
    assert {layer.stage for layer in alone} > {layer.stage for layer in found}
    assert {layer.name: layer.off for layer in alone}.items() >= {layer.name: layer.off for layer in found}.items()
    assert all(layer.other_off is None for layer in alone)


def test_masks_that_switch_nothing_off(backbone: Backbone) -> None:
    executor = FoldedExecutor(backbones.load("test_efficientnet", "random:0"), WeightCache(2**30))
    nothing = executor.pack(replace(frozen(backbone)))
    assert layers(executor, nothing) == []
    ones = random_mask(backbone, "dispatcher", 0, torch.Generator())
    ones = replace(ones, bits=all_ones(backbone.weights.numel()))
    assert {layer.off for layer in layers(executor, executor.pack(ones))} == {0}
    assert layers(executor, executor.pack(ones), nothing) == []


@pytest.mark.parametrize("kind", [PlainExecutor, FoldedExecutor])
def test_a_delta_is_known_after_it_was_packed(backbone: Backbone, kind: type[PlainExecutor]) -> None:
    executor = kind(backbones.load("test_efficientnet", "random:0"), WeightCache(2**30))
    for mask in adapters(backbone, 2).values():
        assert is_delta(executor.pack(mask)) == bool(mask.deltas)
