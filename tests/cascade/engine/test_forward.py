"""What a pass costs a device beside the backbone: how often the host waits for it, and how much is launched."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image

from cascade import Engine, Options, Prediction
from cascade.bundle.format import Bundle
from cascade.engine import items
from cascade.engine.items import Item, stack
from cascade.model.fusion import MODES
from cascade.model.preprocessing import normalize_on_device
from tests.helpers.bundles import handmade, named
from tests.helpers.on_device import Calls, Launches, waits


def run(engine: Engine, batch: Sequence[Item]) -> list[Prediction]:
    """The answers of a batch whose images name their bundles."""
    answers = [answer for answer in engine.run(batch) if isinstance(answer, Prediction)]
    assert len(answers) == len(batch)
    return answers


@pytest.fixture(scope="module")
def bundles(cifar: list[Image.Image]) -> list[Bundle]:
    """A cascade, and twenty single masks that share its trunk."""
    cascade = handmade(cifar[:40], name="cascade", mask_from=2, expert_from=3, experts=3)
    single = handmade(cifar[:40], name="single", mask_from=2, experts=0)
    return [cascade, *(named(single, f"single-{i}") for i in range(20))]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def prepared(engine: Engine, images: list[Image.Image], wishes: Sequence[Options]) -> list[Item]:
    return [engine.prepare(image, wish) for image, wish in zip(images, wishes, strict=False)]  # type: ignore[misc]


def engine_of(bundles: list[Bundle]) -> Engine:
    engine = Engine(max_batch=1)  # what is prepared is not of interest here
    for bundle in bundles:
        engine.add(bundle)
    return engine


def same(a: Prediction, b: Prediction) -> None:
    assert a.masks == b.masks and a.embedding is not None and b.embedding is not None
    np.testing.assert_allclose(a.embedding, b.embedding, rtol=1e-3, atol=1e-4)


def waited(engine: Engine, batch: list[Item]) -> int:
    """How often the host waits for a device in a pass."""
    run(engine, batch)  # what is read from the device once
    with waits() as seen:
        run(engine, batch)
    return len(seen)


@pytest.mark.parametrize("mode, expected", [("dispatcher", 1), ("conditional", 2), ("unconditional", 1)])
def test_how_often_the_host_waits(
    bundles: list[Bundle], cifar: list[Image.Image], calls: Calls, mode: str, expected: int
) -> None:
    """Once for the answers; and for the clusters where they decide which expert runs."""
    engine = engine_of(bundles[:1])
    assert waited(engine, prepared(engine, cifar, [Options(mode=mode, embedding=True)] * 16)) == expected


def test_many_masks_make_the_host_wait_no_more(bundles: list[Bundle], cifar: list[Image.Image], calls: Calls) -> None:
    """What is launched depends on the number of bundles, half of it for out-of-domain scores, not on that of images."""
    engine = engine_of(bundles)
    wishes = [Options(bundle=f"single-{i % 20}", embedding=True) for i in range(32)]
    batch = prepared(engine, cifar, wishes)
    assert waited(engine, batch) == 1
    with Launches() as whole:
        run(engine, batch)
    backbone = engine.executor(bundles[0])
    x = stack(batch, "cpu")
    with Launches() as alone:
        trunk = backbone.run(x, 0, 2)
        backbone.run_each(trunk, [item.bundle.dispatcher for item in batch], 2)  # type: ignore[attr-defined]
    assert len(whole.names) - len(alone.names) <= 20 * 11


def test_experts_of_few_images_run_together(bundles: list[Bundle], cifar: list[Image.Image], calls: Calls) -> None:
    engine = engine_of(bundles[:1])
    batch = prepared(engine, cifar, [Options(mode="conditional", embedding=True)] * 7)
    answers = run(engine, batch)
    experts = {answer.cluster for answer in answers}
    assert len(experts) > 1 and calls.each == [(3, None, 7, len(experts))]
    calls.each.clear()
    for item, answer in zip(batch, answers, strict=True):
        (alone,) = run(engine, [item])
        assert answer.masks == ("dispatcher", f"expert-{answer.cluster}")
        same(alone, answer)
    assert not calls.each, "one image is no mixture"


def test_all_modes_of_a_bundle_share_its_passes(bundles: list[Bundle], cifar: list[Image.Image], calls: Calls) -> None:
    engine = engine_of(bundles[:1])
    batch = prepared(engine, cifar, [Options(mode=MODES[i % 3], embedding=True) for i in range(24)])
    answers = run(engine, batch)
    assert [run for run in calls.runs if run[0] == 2] == [(2, 3, 24)]
    assert len([run for run in calls.runs if run[0] == 3]) == 4, "the dispatcher and each expert once"
    assert [answer.mode for answer in answers] == [item.mode for item in batch]
    for item, answer in zip(batch, answers, strict=True):
        same(run(engine, [item])[0], answer)


def test_every_image_gets_the_labels_that_it_asks_for(bundles: list[Bundle], cifar: list[Image.Image]) -> None:
    engine = engine_of(bundles[:1])
    wishes = [Options(labels=labels, neighbors=3 - labels) for labels in (0, 1, 2, 3)]
    answers: list[Prediction] = run(engine, prepared(engine, cifar, wishes))
    assert [(len(a.labels), len(a.neighbors)) for a in answers] == [(0, 3), (1, 2), (2, 1), (3, 0)]


# --- pixels


def test_pixels_are_those_of_timm(bundles: list[Bundle], cifar: list[Image.Image]) -> None:
    """Normalized in the pass, bit for bit."""
    preprocessing = bundles[0].preprocessing
    crop, transform = preprocessing.crop(), preprocessing.transform()
    raw = torch.stack([crop(image) for image in cifar[:8]])
    assert raw.dtype == torch.uint8
    want = torch.stack([transform(image) for image in cifar[:8]])
    assert normalize_on_device(raw, preprocessing.mean, preprocessing.std).equal(want)
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    got = normalize_on_device(every, preprocessing.mean, preprocessing.std)
    assert got.equal(preprocessing.normalize(every.numpy())), "every value of a byte"


def test_bytes_beside_floats(bundles: list[Bundle], cifar: list[Image.Image]) -> None:
    """Who sends normalized pixels shares the pass with who sends a picture."""
    engine = engine_of(bundles[:1])
    transform = bundles[0].preprocessing.transform()
    batch = prepared(engine, [cifar[0], transform(cifar[1]), cifar[2]], [Options()] * 3)  # type: ignore[list-item]
    assert [item.pixels.dtype for item in batch] == [torch.uint8, torch.float32, torch.uint8]
    assert stack(batch, "cpu").equal(torch.stack([transform(image) for image in cifar[:3]]))


def test_one_transfer_keeps_shapes_and_whole_numbers() -> None:
    tensors = [torch.tensor([2**24 - 1, 3]), torch.empty(0, 4), torch.arange(6.0).view(2, 3), torch.tensor([0.1])]
    for array, tensor in zip(items.download(tensors), tensors, strict=True):
        assert array.dtype == np.float32 and array.shape == tuple(tensor.shape)
        np.testing.assert_array_equal(array, tensor.float().numpy())
    assert items.download([]) == []
