"""Stored trunk features stand for the live crops, and an interrupted store ends with the same bytes."""

import fcntl
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cascade.cache import UNUSED
from cascade.engine.executors.plain import PlainExecutor
from cascade.engine.weight_cache import WeightCache
from cascade.errors import CascadeError
from cascade.model import backbone as backbones
from cascade.model import masks
from cascade.model.masks import Mask
from cascade.model.preprocessing import Preprocessing
from training.data import feature_cache
from training.data.array_cache import stored
from training.data.augment import Crop, multi_crop, shift_flip
from training.loop import generator, seed_everything
from training.masking import MaskedModel, mask_backbone
from training.objectives import Batch, Distillation, SelfSupervised, Supervised
from training.recipe import Recipe

STAGE, DRAWS = 3, 2
RECIPE = Recipe("", size=32, batch=24, local_crops=3, prototypes=30, projection=16, queue=0, draws=DRAWS)
CROPS: tuple[Crop, ...] = RECIPE.crops(32)


@pytest.fixture(scope="module")
def pixels(cifar: list[Image.Image]) -> np.ndarray:
    """More than a batch of the store, so that the last one is a rest: uint8 [100, 3, 36, 36]."""
    return np.stack([np.asarray(image.resize((36, 36))).transpose(2, 0, 1) for image in cifar[:100]])


@pytest.fixture
def executor() -> PlainExecutor:
    return PlainExecutor(backbones.load("test_efficientnet", "random:0"), WeightCache(2**30))


def preprocessing(executor: PlainExecutor) -> Preprocessing:
    return Preprocessing.of(executor.backbone.config, 32)


def store(executor: PlainExecutor, pixels: np.ndarray, path: Path) -> list[np.ndarray]:
    return feature_cache.store(executor, STAGE, pixels, preprocessing(executor), CROPS, DRAWS, path)


def crops_of(pixels: np.ndarray, draw: int, begin: int, crop: Crop, p: Preprocessing) -> Tensor:
    """The crops that the store took of one batch, live: float32 [B, count, 3, side, side]."""
    own, batch = generator(draw, begin, crop[1]), torch.from_numpy(pixels[begin : begin + feature_cache.BATCH])
    some = multi_crop(batch, (crop,), generator=own, mean=p.mean, std=p.std, blur=CROPS[0][1] / 224)
    return torch.stack(some, dim=1)


class Live(SelfSupervised):
    """Trains on the crops of the store, computed from the pixels."""

    images: np.ndarray

    def _trunk(self, model: MaskedModel, batch: Batch) -> Iterator[tuple[int, Tensor]]:
        draws, rows = batch.draws(DRAWS).tolist(), batch.rows
        for crop in CROPS:
            begins = [row // feature_cache.BATCH * feature_cache.BATCH for row in rows.tolist()]
            x = [
                crops_of(self.images, d, b, crop, self.preprocessing)[r - b]
                for d, b, r in zip(draws, begins, rows.tolist(), strict=True)
            ]
            yield crop[0], model.trunk(torch.stack(x).transpose(0, 1).flatten(0, 1))


def step(objective: SelfSupervised, model: MaskedModel, pixels: np.ndarray) -> tuple[float, Tensor]:
    """Loss, and all gradients of the scores in one row."""
    rows = np.random.default_rng(0).permutation(len(pixels))[:24]
    model.train()
    objective.before(0.5)
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    loss = objective.loss(model, Batch(torch.from_numpy(pixels[rows]), rows, 0.5, generators))
    loss.backward()
    return loss.item(), torch.cat([s.grad.flatten() for s in model.scores.values() if s.grad is not None])


def test_a_step_on_stored_features_is_a_step_on_the_same_crops(
    executor: PlainExecutor, pixels: np.ndarray, tmp_path: Path
) -> None:
    held = store(executor, pixels, tmp_path / "views")
    backbone, p, got = executor.backbone, preprocessing(executor), []
    for kind in (SelfSupervised, Live):
        seed_everything(0)
        objective = kind(RECIPE, backbone.features, p, held)
        if isinstance(objective, Live):
            objective.images = pixels
        got.append(step(objective, mask_backbone(backbone, STAGE), pixels))
    (loss, gradient), (live_loss, live_gradient) = got
    assert loss == pytest.approx(live_loss, rel=1e-3)
    assert (gradient - live_gradient).norm() < 0.02 * live_gradient.norm()  # features are kept in half precision


def test_every_row_is_its_images_and_its_draws(executor: PlainExecutor, pixels: np.ndarray, tmp_path: Path) -> None:
    held, p = store(executor, pixels, tmp_path / "views"), preprocessing(executor)
    for crop, group in zip(CROPS, held, strict=True):
        assert group.dtype == np.float16 and group.shape[:2] == (DRAWS * 100, crop[0])
        for draw in range(DRAWS):
            for begin in (0, 64):
                live = crops_of(pixels, draw, begin, crop, p)
                expected = executor.run(live.flatten(0, 1), 0, STAGE).unflatten(0, live.shape[:2])
                rows = group[draw * 100 + begin : draw * 100 + begin + len(live)]
                np.testing.assert_allclose(rows, expected.numpy(), rtol=2e-3, atol=2e-3)
        assert not np.array_equal(group[:100], group[100:]), "each draw is an augmentation of its own"


@pytest.mark.parametrize("passes", [0, 1, 3])
def test_an_interrupted_store_goes_on_and_ends_with_the_same_bytes(
    passes: int, executor: PlainExecutor, pixels: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(executor, pixels, tmp_path / "whole" / "views")
    run, left = executor.run, [passes + 1]  # the first pass measures the shape

    def dies(x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return run(x, start, stop)

    with monkeypatch.context() as patch:
        patch.setattr(executor, "run", dies)
        with pytest.raises(KeyboardInterrupt):
            store(executor, pixels, tmp_path / "cut" / "views")
    parts = list((tmp_path / "cut").iterdir())
    assert [p.suffix for p in parts] == [".part"]
    os.truncate(parts[0], parts[0].stat().st_size * 2 // 3)  # what a kill leaves: some of a batch, some of a row
    store(executor, pixels, tmp_path / "cut" / "views")
    files = sorted(p.name for p in (tmp_path / "whole").iterdir())
    assert sorted(p.name for p in (tmp_path / "cut").iterdir()) == files and len(files) == 2
    for name in files:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_features_are_the_plain_trunks_whatever_mask_is_in_place(
    executor: PlainExecutor, pixels: np.ndarray, tmp_path: Path
) -> None:
    plain = [np.array(group) for group in store(executor, pixels, tmp_path / "plain")]
    every_other = masks.pack(torch.arange(executor.backbone.weights.numel()) % 2 == 0)
    executor.swap(Mask("dispatcher", 0, every_other))
    for a, b in zip(plain, store(executor, pixels, tmp_path / "masked"), strict=True):
        assert np.array_equal(a, b)


def test_crops_of_one_size_would_share_a_file(executor: PlainExecutor, pixels: np.ndarray, tmp_path: Path) -> None:
    same: tuple[Crop, ...] = ((2, 32, (0.14, 1.0)), (6, 32, (0.05, 0.14)))
    with pytest.raises(CascadeError, match="--local-size"):
        feature_cache.store(executor, STAGE, pixels, preprocessing(executor), same, DRAWS, tmp_path / "views")


def test_of_many_that_want_it_one_stores(tmp_path: Path) -> None:
    """Experts that are trained beside each other, by processes that know nothing of each other."""
    made = []

    def rows(done: int) -> Iterator[np.ndarray]:
        made.append(done)
        for row in np.arange(12, dtype=np.float32).reshape(4, 3)[done:]:
            time.sleep(0.02)
            yield row

    with ThreadPoolExecutor(4) as pool:
        for array in pool.map(lambda _: stored(tmp_path / "a.npy", (4, 3), np.dtype("<f4"), rows), range(4)):
            np.testing.assert_array_equal(array, np.arange(12).reshape(4, 3))
    assert made == [0] and [path.name for path in tmp_path.iterdir()] == ["a.npy"]


def test_who_waits_does_not_come_before_the_file_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace, held = Path.replace, []

    def watched(part: Path, file: Path) -> Path:
        with open(part, "ab") as other:
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                held.append(part.name)
        return replace(part, file)

    monkeypatch.setattr(Path, "replace", watched)
    stored(tmp_path / "a.npy", (2, 3), np.dtype("<f4"), lambda done: np.zeros((2, 3), np.float32)[done:])
    assert held == ["a.part"]


def test_arrays_that_nobody_uses_leave_with_the_next_one(tmp_path: Path) -> None:
    def array(name: str) -> np.ndarray:
        return stored(tmp_path / name, (2, 3), np.dtype("u1"), lambda done: np.ones((2, 3), np.uint8)[done:])

    then = time.time() - UNUSED - 60
    for name in ("old.npy", "kept.npy", "cut-off.part", "notes.txt"):
        array(name) if name.endswith("npy") else (tmp_path / name).touch()
        os.utime(tmp_path / name, (then, then))
    array("kept.npy")  # used again
    assert array("new.npy").tolist() == [[1, 1, 1], [1, 1, 1]]
    assert {path.name for path in tmp_path.iterdir()} == {"kept.npy", "new.npy", "notes.txt"}


def test_labels_and_distillation_train_on_stored_features_as_on_pixels(
    executor: PlainExecutor, pixels: np.ndarray, tmp_path: Path
) -> None:
    """Distillation loses nothing: it knows two views of an image. With labels the draws are those of the store."""
    p, rows = Preprocessing.of(executor.backbone.config, 36), np.array([70, 3, 99, 64])
    model = mask_backbone(executor.backbone, STAGE)
    batch = Batch(torch.from_numpy(pixels[rows]), rows, 0.0, [generator(7)])
    teacher = np.random.default_rng(0).normal(size=(2, len(pixels), executor.backbone.features)).astype(np.float16)
    mirrored = feature_cache.store_mirrored(executor, STAGE, pixels, p, tmp_path / "mirrored")
    losses = []
    for views in (None, mirrored):
        batch.generators[0].manual_seed(1)
        losses.append(float(Distillation(RECIPE, p, teacher, views=views).loss(model, batch).detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[0] > 0
    shifted = feature_cache.store_shifted(executor, STAGE, pixels, p, 4, DRAWS, tmp_path / "shifted")
    labels = np.arange(len(pixels)) % 4
    loss = Supervised(replace(RECIPE, labels=True), executor.backbone.features, p, labels, views=shifted)
    draws = Batch(batch.pixels, rows, 0.0, [generator(7)]).draws(DRAWS)
    found = loss._trunk(model, Batch(batch.pixels, rows, 0.0, [generator(7)]))
    for row, draw, own in zip(rows, draws.tolist(), found, strict=True):
        begin = row // feature_cache.BATCH * feature_cache.BATCH
        some = torch.from_numpy(pixels[begin : begin + feature_cache.BATCH])
        live = model.trunk(shift_flip(some, 4, generator(draw, begin, p.size), p.mean, p.std))[row - begin]
        torch.testing.assert_close(own, live, rtol=1e-2, atol=1e-2)
