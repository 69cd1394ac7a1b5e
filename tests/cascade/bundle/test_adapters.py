"""How each kind of adapter is stored: what is written, in which format version, and what is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

import cascade
from cascade.bundle import archive
from cascade.bundle.format import Bundle, BundleError, check, format_of, read, write
from cascade.bundle.schema import MaskCard
from cascade.model import backbone as backbones
from cascade.model.fusion import Identity
from cascade.model.heads import Linear
from cascade.model.masks import Mask, all_ones, frozen, unpack
from tests.helpers.adapters import random_channels
from tests.helpers.bundles import CLASSES, handmade

KINDS = ("mask+channels", "channels", "frozen")


def adapted(images: list[Image.Image], kind: str) -> Bundle:
    """A bundle of one adapter without a fusion, whose head works on the features."""
    base = handmade(images, experts=0)
    backbone = backbones.load(base.card.backbone.name, base.card.backbone.source)
    generator = torch.Generator().manual_seed(3)
    bits = base.dispatcher.bits if kind == "mask+channels" else all_ones(backbone.weights.numel())
    mask = Mask("dispatcher", 0, bits, {}, random_channels(backbone, 0, generator))
    if kind == "frozen":
        mask = frozen(backbone)
    weights = backbone.weights.numel() - backbone.offset(mask.start)
    card = MaskCard(name="dispatcher", start=mask.start, weights=weights, density=1.0)
    head = Linear(torch.randn(len(CLASSES), backbone.features, generator=generator).half(), torch.zeros(len(CLASSES)))
    bundle = replace(
        base,
        card=base.card.model_copy(update={"masks": [card], "dim": backbone.features}),
        dispatcher=mask,
        ood=None,
        fusions={"dispatcher": Identity.of(backbone.features)},
        linear={"dispatcher": head},
        banks={},
    )
    return replace(bundle, card=bundle.card.model_copy(update={"format": format_of(bundle)}))


def same(a: Bundle, b: Bundle) -> None:
    assert a.card.model_copy(update={"bytes": {}}) == b.card.model_copy(update={"bytes": {}})
    for mine, other in zip(a.masks, b.masks, strict=True):
        assert mine.start == other.start and mine.bits.equal(other.bits)
        assert mine.channels.keys() == other.channels.keys()
        assert all(t.equal(other.channels[n]) and t.dtype == torch.float16 for n, t in mine.channels.items())
    assert a.linear["dispatcher"].weight.equal(b.linear["dispatcher"].weight)
    assert isinstance(b.fusions["dispatcher"], Identity)


@pytest.mark.parametrize("kind", KINDS)
def test_roundtrip(cifar: list[Image.Image], tmp_path: Path, kind: str) -> None:
    bundle = adapted(cifar[:30], kind)
    path = write(bundle, tmp_path / "hand" / "1")
    same(bundle, read(path))
    assert read(path).card.format == 2
    packed = archive.pack(path, tmp_path / "hand.cascade")
    again = archive.unpack(packed, tmp_path / "hand" / "2")
    assert {p.name: p.read_bytes() for p in path.iterdir()} == {p.name: p.read_bytes() for p in again.iterdir()}


@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_answers(cifar: list[Image.Image], tmp_path: Path, kind: str) -> None:
    bundle = adapted(cifar[:30], kind)
    engine = cascade.load(write(bundle, tmp_path / "hand" / "1"))
    (answer,) = engine.predict([cifar[0]], cascade.Options(embedding=True, labels=3))
    assert isinstance(answer, cascade.Prediction)
    assert answer.embedding is not None
    assert len(answer.embedding) == bundle.card.backbone.features and len(answer.labels) == 3
    assert (engine.stats()["misses"] == 0) == (kind == "frozen"), "a frozen bundle needs no swap"


def test_a_frozen_bundle_is_small(cifar: list[Image.Image], tmp_path: Path) -> None:
    path = write(adapted(cifar[:30], "frozen"), tmp_path / "hand" / "1")
    assert {p.name for p in path.iterdir()} == {"cascade.json", "SHA256SUMS", "heads.safetensors"}


def test_ones_are_not_stored(cifar: list[Image.Image], tmp_path: Path) -> None:
    path = write(adapted(cifar[:30], "channels"), tmp_path / "hand" / "1")
    stored = safetensors.torch.load((path / "masks.safetensors").read_bytes())
    assert stored and all(name.startswith("dispatcher.channels.") for name in stored)
    n = read(path).card.masks[0].weights
    assert unpack(read(path).dispatcher.bits, n + 7)[n:].sum() == 0, "unused bits are zero"


def test_what_is_not_new_stays_format_1(cifar: list[Image.Image], tmp_path: Path) -> None:
    path = write(handmade(cifar[:30]), tmp_path / "hand" / "1")
    assert read(path).card.format == 1


def change_mask(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Bundle], Bundle]:
    def changed(bundle: Bundle) -> Bundle:
        channels = dict(bundle.dispatcher.channels)
        change(channels)
        return replace(bundle, dispatcher=replace(bundle.dispatcher, channels=channels))

    return changed


def first(channels: dict[str, Tensor]) -> str:
    return next(iter(channels))


WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "not finite": (
        lambda c: c.update({first(c): torch.full_like(c[first(c)], torch.nan)}),
        "numbers are finite",
    ),
    "another dtype": (lambda c: c.update({first(c): c[first(c)].float()}), "not finite float16"),
    "a matrix": (lambda c: c.update({first(c): c[first(c)][None]}), "in one dimension"),
    "another length": (lambda c: c.update({first(c): c[first(c)][:-1]}), "has no parameter"),
    "no such parameter": (lambda c: c.update({"layer9.bn.weight": torch.ones(4).half()}), "has no parameter"),
    "two dimensions": (lambda c: c.update({"conv1.weight": torch.ones(4).half()}), "has no parameter"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_channels_are_refused(cifar: list[Image.Image], tmp_path: Path, case: str) -> None:
    change, message = WRONG[case]
    bundle = change_mask(change)(adapted(cifar[:30], "channels"))
    backbone = backbones.load(bundle.card.backbone.name, bundle.card.backbone.source)
    with pytest.raises(BundleError, match=message):
        check(read(write(bundle, tmp_path / "hand" / "1")), backbone)


def test_channels_before_the_first_stage_are_refused(cifar: list[Image.Image]) -> None:
    bundle = adapted(cifar[:30], "channels")
    backbone = backbones.load(bundle.card.backbone.name, bundle.card.backbone.source)
    n = backbone.weights.numel() - backbone.offset(2)
    late = replace(bundle.dispatcher, start=2, bits=all_ones(n))
    with pytest.raises(BundleError, match="from its first stage on"):
        check(replace(bundle, dispatcher=late), backbone)
