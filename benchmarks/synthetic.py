"""Bundles of random masks on seeded random weights: neither time nor bytes depend on their values."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cascade.bundle.format import Bundle
from cascade.bundle.schema import BackboneCard, Card, MaskCard, RouterCard
from cascade.engine.engine import Engine
from cascade.engine.executors.selection import Kind, choose, make
from cascade.engine.items import Item
from cascade.engine.results import Options
from cascade.engine.weight_cache import WeightCache
from cascade.model import backbone as backbones
from cascade.model.backbone import Backbone
from cascade.model.fusion import Fusion, Mode
from cascade.model.masks import Mask
from cascade.model.preprocessing import Preprocessing
from cascade.model.router import Calibration
from training.clusters import fit_centroids

DENSITY = 15 / 16  # active weights; the paper's on CIFAR-100 is 0.925
DIM = 256
QUICK = Options(embedding=True, labels=0, neighbors=0)


def mask(backbone: Backbone, name: str, start: int, seed: int) -> Mask:
    """A mask with ``DENSITY`` of the weights active, and its own BatchNorm statistics."""
    draw = np.random.default_rng(seed)
    size = -(-(backbone.weights.numel() - backbone.offset(start)) // 8)
    bits = np.zeros(size, np.uint8)
    for _ in range(4):  # a bit is off where four random ones are
        bits |= np.frombuffer(draw.bytes(size), np.uint8)
    prefixes = tuple(f"{prefix}." for stage in backbone.stages[start:] for prefix in stage.prefixes)
    norms = {n: t * float(draw.uniform(0.9, 1.1)) for n, t in backbone.norms.items() if n.startswith(prefixes)}
    return Mask(name, start, torch.from_numpy(bits), norms)


def single(backbone: Backbone, name: str, seed: int, dim: int = DIM, mask_from: int = 0) -> Bundle:
    """A bundle with one mask, by default over every maskable weight."""
    return bundle_of(backbone, name, [mask(backbone, "dispatcher", mask_from, seed)], dim)


def cascade(backbone: Backbone, name: str, experts: int, expert_from: int, mask_from: int = 0) -> Bundle:
    """A cascade whose router was fitted on noise, so that noise spreads over its clusters."""
    masks = [mask(backbone, "dispatcher", mask_from, 0)]
    masks += [mask(backbone, f"expert-{k}", expert_from, k + 1) for k in range(experts)]
    bundle = bundle_of(backbone, name, masks, DIM)
    executor = make(backbone, WeightCache(2**40), "folded")
    executor.swap(executor.pack(masks[0]))
    found = torch.cat([executor.run(noise(backbone, 16, seed)) for seed in range(4)]).numpy()
    router = fit_centroids(found, experts, 0)
    card = bundle.card.model_copy(update={"router": RouterCard(kind=router.kind, shares=[1 / experts] * experts)})
    return replace(bundle, router=router, card=card)


def noise(backbone: Backbone, count: int, seed: int = 0) -> Tensor:
    """Images, float32 [count, 3, H, W], each with a different color and contrast."""
    generator = torch.Generator().manual_seed(seed)
    look = torch.randn(count, 3, 1, 1, generator=generator)
    return look + torch.randn(count, *backbone.config["input_size"], generator=generator) * look.abs().amax(1, True)


def engine_of(bundles: list[Bundle], budget: int, executor: Kind = "auto") -> Engine:
    """An engine with the bundles and a budget in bytes."""
    engine = Engine(budget, executor=executor)
    for bundle in bundles:
        engine.add(bundle)
    return engine


def item(engine: Engine, name: str, pixels: Tensor, mode: Mode | None = None, version: str | None = None) -> Item:
    """An image, ready for a pass."""
    bundle = engine.find(name, version)
    assert isinstance(bundle, Bundle)
    return Item(bundle, mode or bundle.card.mode, QUICK, pixels)


def executor_name(backbone: str) -> str:
    """Class name of the executor that engines choose on this machine for a backbone, by name."""
    return type(choose(load(backbone), WeightCache(0))).__name__


def mask_bytes(backbone: Backbone) -> int:
    """Bytes of one mask's materialized weights, with room for padding."""
    return int(4 * backbone.weights.numel() * 1.05)


def load(name: str) -> Backbone:
    """Seeded random weights."""
    return backbones.load(name, "random:0")


def bundle_of(backbone: Backbone, name: str, masks: list[Mask], dim: int = DIM, size: int | None = None) -> Bundle:
    """A bundle of these masks: the dispatcher, then the experts. size: of its images, default: the backbone's own."""
    experts = len(masks) - 1
    slots: dict[Mode, int] = {"dispatcher": 1}
    slots |= {"conditional": 2, "unconditional": experts + 1} if experts else {}
    generator = torch.Generator().manual_seed(0)
    preprocessing = Preprocessing.of(backbone.config, size)
    card: dict[str, Any] = {
        "format": 1,
        "backbone": BackboneCard.of(backbone),
        "preprocessing": preprocessing.to_json(),
        "masks": [
            MaskCard(
                name=m.name, start=m.start, weights=backbone.weights.numel() - backbone.offset(m.start), density=DENSITY
            )
            for m in masks
        ],
        "mode": "conditional" if experts else "dispatcher",
        "dim": dim,
    }
    return Bundle(
        name=name,
        version="1",
        card=Card(**card),
        preprocessing=preprocessing,
        dispatcher=masks[0],
        experts=tuple(masks[1:]),
        router=None,
        calibration=Calibration(),
        ood=None,
        fusions={
            mode: Fusion((torch.randn(n, backbone.features, dim, generator=generator) / 50).half(), torch.zeros(dim))
            for mode, n in slots.items()
        },
    )
