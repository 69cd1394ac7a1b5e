"""Bundles over two backbones, a store with bad ones among good ones, and a small store."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from cascade.bundle.format import Bundle, write
from tests.helpers.bundles import handmade
from tests.helpers.registry import flip


@pytest.fixture(scope="module")
def hand(cifar: list[Image.Image]) -> Bundle:
    return handmade(cifar[:40], experts=0)


@pytest.fixture(scope="module")
def other(cifar: list[Image.Image]) -> Bundle:
    """Over another backbone."""
    return handmade(cifar[:40], experts=2, source="random:1")


@pytest.fixture
def store(hand: Bundle, tmp_path: Path) -> Path:
    """Three good bundles; one with a flipped byte, one half copied, one foreign, one without weights, one hidden."""
    root = tmp_path / "store"
    for path in ("a/1", "a/2", "b/1", "corrupt/1", "half/1"):
        write(hand, root / path)
    flip(root / "corrupt/1/masks.safetensors")
    (root / "half/1/fusion.safetensors").unlink()
    back = hand.card.backbone.model_copy(update={"fingerprint": "1" * 64})
    write(replace(hand, card=hand.card.model_copy(update={"backbone": back})), root / "foreign/1")
    elsewhere = hand.card.backbone.model_copy(update={"fingerprint": "2" * 64, "source": "file:gone.safetensors"})
    write(replace(hand, card=hand.card.model_copy(update={"backbone": elsewhere})), root / "lost/1")
    shutil.copytree(root / "a/1", root / "a/.3.99.tmp")
    return root


@pytest.fixture
def small(hand: Bundle, tmp_path: Path) -> Path:
    """A store of one good bundle, ``a/1``."""
    write(hand, tmp_path / "small/a/1")
    return tmp_path / "small"
