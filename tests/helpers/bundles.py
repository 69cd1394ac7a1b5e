"""Bundles made by hand: random bits over small random networks, with every part that a trained bundle has."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from cascade.bundle.format import Bundle
from cascade.bundle.schema import BackboneCard, Card, MaskCard, RouterCard
from cascade.kernels.materialize import materialize
from cascade.model import backbone as backbones
from cascade.model.backbone import Backbone
from cascade.model.fusion import Fusion, Mode
from cascade.model.heads import Bank, Linear
from cascade.model.masks import Mask, density, difference, pack
from cascade.model.preprocessing import Preprocessing
from cascade.model.router import Calibration, Router
from cascade.model.stages import stage_of
from training.clusters import fit_centroids, fit_gmm, fit_ood, fit_prototypes

CLASSES = ("cat", "dog", "ship")


def random_mask(backbone: Backbone, name: str, start: int, generator: torch.Generator, norms: bool = False) -> Mask:
    """About nine of ten weights active; with ``norms``, statistics of its own for every BatchNorm it covers."""
    n = backbone.weights.numel() - backbone.offset(start)
    bits = pack(torch.rand(n, generator=generator) < 0.9)
    moved = {}
    for buffer, tensor in backbone.norms.items() if norms else ():
        if stage_of(buffer, backbone.stages) >= start:
            drawn = torch.rand(tensor.shape, generator=generator)
            moved[buffer] = tensor * (0.3 + drawn / 2) if buffer.endswith("var") else tensor + (drawn - 0.5) / 50
    return Mask(name, start, bits, moved)


@torch.inference_mode()
def features(mask: Mask, backbone: Backbone, inputs: Tensor) -> np.ndarray:
    """Features under one mask, from a network of its own."""
    own = backbones.load(backbone.name, backbone.source)
    own.point(materialize(own, mask), own.offset(mask.start))
    state = own.model.state_dict()
    for name, tensor in (mask.norms | mask.channels).items():
        state[name].copy_(tensor)
    return own.model(inputs).numpy()


def handmade(
    images: list[Image.Image],
    *,
    name: str = "hand",
    version: str = "1",
    backbone: str = "test_resnet",
    source: str = "random:0",
    mask_from: int = 0,
    expert_from: int | None = None,
    experts: int = 2,
    router: str = "centroid",
    slots: str = "one",
    norms: bool = False,
    seed: int = 0,
    size: int = 64,
    dim: int = 8,
) -> Bundle:
    """A bundle whose router and out-of-domain score are fitted on the ``images``; all else is drawn from ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    bare = backbones.load(backbone, source)
    preprocessing = Preprocessing.of(bare.config, size, 1.0)
    start = mask_from if expert_from is None else expert_from
    masks = [random_mask(bare, "dispatcher", mask_from, generator, norms)]
    masks += [random_mask(bare, f"expert-{k}", start, generator, norms) for k in range(experts)]
    transform = preprocessing.transform()
    found = features(masks[0], bare, torch.stack([transform(i) for i in images]))
    projector = {
        "head.weight": torch.randn(16, bare.features, generator=generator),
        "head.bias": torch.zeros(16),
        "prototypes": torch.randn(30, 16, generator=generator),
    }
    fits: dict[str, Callable[[], Router]] = {
        "centroid": lambda: fit_centroids(found, experts, seed),
        "gmm": lambda: fit_gmm(found, experts, seed),
        "prototypes": lambda: fit_prototypes(projector, found, experts, seed),
    }
    modes: dict[Mode, int] = {"dispatcher": 1}
    if experts:
        modes |= {"conditional": 2 if slots == "one" else experts + 1, "unconditional": experts + 1}
    rows = tuple(f"image-{i}" for i in range(20))
    return Bundle(
        name=name,
        version=version,
        card=Card(
            format=1,
            backbone=BackboneCard.of(bare),
            preprocessing=preprocessing.to_json(),
            masks=[
                MaskCard(
                    name=m.name,
                    start=m.start,
                    weights=bare.weights.numel() - bare.offset(m.start),
                    density=density(bare, m),
                    differs_from_dispatcher=difference(m, masks[0], bare),
                )
                for m in masks
            ],
            router=RouterCard(kind=router, shares=[1 / experts] * experts, slope=0.7, intercept=0.1)
            if experts
            else None,
            mode="conditional" if experts else "dispatcher",
            dim=dim,
            classes=list(CLASSES),
        ),
        preprocessing=preprocessing,
        dispatcher=masks[0],
        experts=tuple(masks[1:]),
        router=fits[router]() if experts else None,
        calibration=Calibration(0.7, 0.1) if experts else Calibration(),
        ood=fit_ood(found[::2], found[1::2]),
        fusions={
            mode: Fusion(
                torch.randn(count, bare.features, dim, generator=generator).half(),
                torch.randn(dim, generator=generator),
            )
            for mode, count in modes.items()
        },
        linear={
            mode: Linear(
                torch.randn(len(CLASSES), dim, generator=generator) / 8,
                torch.randn(len(CLASSES), generator=generator),
            )
            for mode in modes
        },
        banks={
            mode: Bank(
                normalize(torch.randn(len(rows), dim, generator=generator)).half(),
                rows,
                tuple(CLASSES[i % 3] for i in range(len(rows))),
            )
            for mode in modes
        },
    )


def named(bundle: Bundle, name: str, version: str = "1") -> Bundle:
    """The same bundle under another name: a mask apart is a mask apart, however equal its bits."""
    return replace(
        bundle,
        name=name,
        version=version,
        dispatcher=replace(bundle.dispatcher),
        experts=tuple(replace(m) for m in bundle.experts),
    )
