"""What reduced precision changes, for the card of a bundle."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cascade import Engine
from cascade.bundle.format import Bundle, read
from cascade.engine.executors.plain import PlainExecutor
from cascade.engine.executors.precision import exact
from cascade.engine.weight_cache import WeightCache
from cascade.model import backbone as backbones
from cascade.model.fusion import MODES
from tests.helpers.answers import answers, embeddings
from tests.helpers.bundles import handmade
from training import embed, precision


@pytest.fixture(scope="module")
def bundle(cifar: list[Image.Image]) -> Bundle:
    return handmade(cifar[:40], mask_from=2, expert_from=3, experts=3, norms=True)


@pytest.fixture
def executor(bundle: Bundle) -> PlainExecutor:
    backbone = bundle.card.backbone
    return PlainExecutor(backbones.load(backbone.name, backbone.source), WeightCache(2**30))


@pytest.mark.parametrize("mode", MODES)
def test_embeddings_are_those_that_are_served(
    bundle: Bundle, executor: PlainExecutor, cifar: list[Image.Image], mode: str
) -> None:
    engine = Engine()
    engine.add(bundle)
    served = embeddings(answers(engine, cifar[:6], mode=mode))
    bundle = replace(bundle, card=bundle.card.model_copy(update={"mode": mode}))
    pixels = embed.cropped(cifar[:6], bundle.preprocessing)
    got = precision._embeddings(bundle, executor, pixels, exact)
    np.testing.assert_allclose(got, served, rtol=1e-3, atol=1e-4)


def test_bfloat16_moves_embeddings_a_little(
    bundle: Bundle, executor: PlainExecutor, cifar: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "IMAGES", 16)
    pixels = embed.cropped(cifar[:20], bundle.preprocessing)
    found = precision.measure(bundle, executor, pixels)
    assert set(found) == {"bf16"} | ({"tf32"} if torch.cuda.is_available() else set())
    moved = found["bf16"]
    assert moved["images"] == 16 and 0.9 < moved["least"] < moved["cosine"] < 1
    assert 0 <= moved["other_labels"] < 0.5
    assert executor.precision is exact


def test_the_card_of_a_trained_bundle_tells(bundle_path: Path) -> None:
    moved = read(bundle_path).card.accuracy["precision"]["bf16"]
    assert moved["images"] == 60 and moved["least"] <= moved["cosine"] <= 1
