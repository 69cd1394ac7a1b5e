"""The threshold of a larger input size, and a whole training with one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cascade import CascadeError, Engine, Options, Prediction
from cascade.bundle.format import check, read
from cascade.model import backbone as backbones
from cascade.model.heads import Linear
from training import deferral, dispatcher, export, pipeline
from training.cli import Watch
from training.deferral import Answers
from training.frozen import frozen_head
from training.recipe import Recipe
from training.run import Run, begin


class Said(Watch):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(None)
        self.lines: list[str] = []
        self.tables = 0

    def say(self, text: str) -> None:
        self.lines.append(text)

    def show(self, table: object) -> None:
        self.tables += 1


def answers(count: int = 1000) -> Answers:
    """The small size is right as often as it says, the larger one nine times of ten."""
    generator = np.random.default_rng(0)
    confidence = generator.uniform(0.3, 1.0, count).astype(np.float32)
    return Answers(confidence, generator.random(count) < confidence, generator.random(count) < 0.9)


def test_the_threshold_is_the_lowest_that_loses_no_more() -> None:
    both = answers()
    goal = both.large.mean()
    order = np.argsort(both.confidence)
    for lose in (0.0, 0.3, 2.0, 10.0):
        threshold = both.threshold(lose)
        accuracy, share = both.at(threshold)
        assert accuracy >= goal - lose / 100 - 1e-9
        for fewer in range(round(share * len(order))):
            again = np.isin(np.arange(len(order)), order[:fewer])
            assert np.where(again, both.large, both.small).mean() < goal - lose / 100
    assert both.threshold(0.0) > both.threshold(2.0) > both.threshold(10.0)
    assert both.threshold(100.0) == 0.0


def test_images_of_equal_confidence_are_not_told_apart() -> None:
    both = Answers(np.full(4, 0.5, np.float32), np.array([1, 0, 0, 0], bool), np.array([0, 1, 1, 1], bool))
    assert both.at(both.threshold(0.0)) == (0.75, 1.0)


def opened(folder: Path, data: Path, **options: object) -> tuple[Run, Said]:
    watch = Said()
    settings = {"backbone": "test_efficientnet", "source": "random:0", "size": 32, "steps": 4, "labels": True}
    return begin(folder, Recipe(str(data), **(settings | options)), watch), watch  # type: ignore[arg-type]


def answered(engine: Engine, images: list[Image.Image], mode: str) -> list[Prediction]:
    found = engine.predict(images, Options(mode=mode, labels=10))
    assert all(isinstance(each, Prediction) for each in found)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("frozen", [True, False])
def test_a_training_with_a_larger_size(cifar_folder: Path, tmp_path: Path, frozen: bool) -> None:
    run, watch = opened(tmp_path / "run", cifar_folder)
    small = frozen_head(run)
    out = pipeline.train(run, tmp_path / "sizes" / "1", frozen=frozen, defer_to=64, lose=0.3)
    bundle = read(out)
    if bundle.larger is None:
        pytest.fail(f"the larger size must be better here: {watch.lines}")
    check(bundle, backbones.load("test_efficientnet", "random:0"))
    assert (bundle.preprocessing.size, bundle.larger.preprocessing.size) == (32, 64)
    assert bundle.card.deferral is not None and watch.tables
    modes = bundle.card.deferral.accuracy["modes"]
    assert modes["full"]["validation"] > modes["fast"]["validation"]
    assert modes["adaptive"]["validation"] >= modes["full"]["validation"] - 0.003 - 1e-4
    assert 0 < bundle.card.deferral.share <= 1 and small.validation >= 0
    engine = Engine(executor="plain")
    engine.add(bundle)
    truth = [run.held_out.classes[label] for label in run.held_out.labels]  # type: ignore[union-attr]
    images = [run.held_out.open(i) for i in range(len(truth))]
    for mode in ("fast", "adaptive", "full"):
        found = answered(engine, images, mode)
        right = np.mean([a.labels[0].name == label for a, label in zip(found, truth, strict=True)])
        assert right == pytest.approx(modes[mode]["test"], abs=0.02), "the server answers as was measured"
        if mode == "adaptive":
            again = np.mean([a.deferral is not None and a.deferral.deferred for a in found])
            assert again == pytest.approx(modes[mode]["again"], abs=0.02)


def test_it_is_not_trained_again_and_has_the_same_bytes(cifar_folder: Path, tmp_path: Path) -> None:
    run, _ = opened(tmp_path / "run", cifar_folder, steps=0)
    first = pipeline.train(run, tmp_path / "sizes" / "1", frozen=True, defer_to=64)
    again = pipeline.train(run, tmp_path / "sizes" / "2", frozen=True, defer_to=64)
    assert [f.read_bytes() for f in sorted(first.iterdir())] == [f.read_bytes() for f in sorted(again.iterdir())]


def test_a_larger_size_that_is_no_better_is_left_out(
    cifar_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, watch = opened(tmp_path / "run", cifar_folder, steps=0)
    features = run.features

    def telling(name: str, preprocessing: object = None) -> list[np.ndarray]:
        """The class itself at the small size, nothing at the larger one."""
        found = [np.zeros_like(part) for part in features(name)]
        for part, images in zip(found, (run.images, run.held_out), strict=True):
            part[np.arange(len(part)), images.labels] = 0.0 if preprocessing else 1.0
        return found

    monkeypatch.setattr(run, "features", telling)
    bundle = read(pipeline.train(run, tmp_path / "sizes" / "1", frozen=True, defer_to=64))
    assert bundle.larger is None and any("64 px are no better than 32 px" in line for line in watch.lines)


def test_a_small_size_that_loses_little_is_left_alone(cifar_folder: Path, tmp_path: Path) -> None:
    run, watch = opened(tmp_path / "run", cifar_folder, steps=0)
    bundle = read(pipeline.train(run, tmp_path / "sizes" / "1", frozen=True, defer_to=64, lose=100.0))
    assert bundle.larger is None and any("lose less than 100 points" in line for line in watch.lines)


def test_what_is_wrong_is_said_before_anything_is_trained(
    cifar_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = opened(tmp_path / "run", cifar_folder)
    with pytest.raises(CascadeError, match="--defer-to 32 is not larger than the input of 32 px"):
        pipeline.train(run, tmp_path / "sizes" / "1", defer_to=32)
    unlabeled, _ = opened(tmp_path / "other", cifar_folder, labels=False)
    with pytest.raises(CascadeError, match="give --labels"):
        pipeline.train(unlabeled, tmp_path / "sizes" / "1", defer_to=64)

    def fixed(x: torch.Tensor) -> None:
        raise AssertionError("Input height (64) doesn't match model (32).")

    monkeypatch.setattr(run.executor, "run", fixed)
    with pytest.raises(CascadeError, match="can't take images of 64 px"):
        deferral.preprocessing_of(run, 64)


def test_the_larger_size_serves_a_mask_of_its_own(cifar_folder: Path, tmp_path: Path) -> None:
    run, _ = opened(tmp_path / "run", cifar_folder, steps=20, lr=0.5, head_lr=0.02)
    larger = deferral.at_size(run, 64)
    dispatcher.train(larger)
    head = frozen_head(run)
    blind = replace(head, head=Linear(torch.zeros_like(head.head.weight), head.head.bias), validation=0.0)
    found = deferral.fit(run, blind, [], 64, 0.0, larger)
    assert found is not None and found.card.accuracy["trained_at"] == 64
    bundle = read(export.export_classifier(run, blind, {}, tmp_path / "sizes" / "1", larger=found))
    check(bundle, run.backbone)
    assert bundle.larger is not None and bundle.dispatcher.start == len(run.backbone.stages)
    mask = larger.dispatcher
    assert mask.channels and torch.equal(bundle.larger.dispatcher.bits, mask.bits) and found.card.mask.density < 1
    engine = Engine(executor="plain")
    engine.add(bundle)
    images = [run.held_out.open(i) for i in range(len(run.held_out))]
    truth = [run.held_out.classes[label] for label in run.held_out.labels]  # type: ignore[union-attr]
    full, adaptive = (answered(engine, images, mode) for mode in ("full", "adaptive"))
    right = np.mean([a.labels[0].name == label for a, label in zip(full, truth, strict=True)])
    assert right == pytest.approx(found.card.accuracy["modes"]["full"]["test"], abs=0.02)
    assert [a.labels[0].name for a in adaptive] == [a.labels[0].name for a in full]
    assert all(a.masks == ("dispatcher", "larger.dispatcher") for a in adaptive)


def test_both_masks_are_trained_by_one_command_that_resumes(cifar_folder: Path, tmp_path: Path) -> None:
    run, watch = opened(tmp_path / "run", cifar_folder, steps=2)
    first = pipeline.train(run, tmp_path / "sizes" / "1", defer_to=64, larger_mask=True)
    assert "4 steps of 64 images: mask 2, mask-64 2" in watch.lines
    (offered,) = (line for line in watch.lines if line.startswith("at 64 px, of the validation images: "))
    titles = "the frozen backbone", "the adapter trained at 32 px", "the adapter trained at 64 px"
    assert all(title in offered for title in titles)
    trained = tmp_path / "run-64" / "dispatcher" / "done.safetensors"
    before = trained.stat().st_mtime_ns
    again, _ = opened(tmp_path / "run", cifar_folder, steps=2)
    second = pipeline.train(again, tmp_path / "sizes" / "2", defer_to=64, larger_mask=True)
    assert trained.stat().st_mtime_ns == before
    assert [f.read_bytes() for f in sorted(first.iterdir())] == [f.read_bytes() for f in sorted(second.iterdir())]


def test_the_planned_time_is_that_of_both_masks(
    cifar_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, watch = opened(tmp_path / "run", cifar_folder, steps=1000)
    monkeypatch.setattr(pipeline, "_seconds_per_step", lambda each: 0.1 if each.preprocessing.size == 32 else 0.4)
    monkeypatch.setattr(pipeline, "_labeled", lambda run, out, *_: out)
    pipeline.train(run, tmp_path / "sizes" / "1", defer_to=64, larger_mask=True)
    assert watch.lines[-1] == "about 8.3 min, at 0.1 and 0.4 s a step"
    pipeline.train(run, tmp_path / "sizes" / "2", defer_to=64, larger_mask=True, minutes=5)
    assert "600 steps fit into 5 minutes at 0.1 s a step" in watch.lines
    assert "600 steps of 64 fit into 5 minutes at 0.4 s a step" in watch.lines
    assert watch.lines[-1] == "1200 steps of 64 images: mask 600, mask-64 600"


@pytest.mark.parametrize("options", [{}, {"defer_to": 64, "frozen": True}])
def test_a_mask_of_no_larger_size_is_refused(cifar_folder: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    run, _ = opened(tmp_path / "run", cifar_folder)
    with pytest.raises(CascadeError, match="--larger-mask trains a mask for the size of --defer-to"):
        pipeline.train(run, tmp_path / "sizes" / "1", larger_mask=True, **options)
