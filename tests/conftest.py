"""Fixtures of all tests: real images, one small trained cascade, and ``need`` for optional requirements."""

import fcntl
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cascade.metrics_names import BusiestNames
from tests.helpers.paths import DATA


def need(condition: object, reason: str) -> None:
    """Skip the test unless ``condition`` holds; with REQUIRE_ALL=1, fail it."""
    if not condition:
        if os.environ.get("REQUIRE_ALL") == "1":
            pytest.fail(f"REQUIRE_ALL=1, but: {reason}")
        pytest.skip(reason)


def sheet(name: str) -> list[Image.Image]:
    """The 300 real images of a contact sheet in tests/data, RGB."""
    whole = Image.open(DATA / f"{name}.png")
    side = whole.width // 20
    boxes = [(x * side, y * side, (x + 1) * side, (y + 1) * side) for y in range(15) for x in range(20)]
    return [whole.crop(box).convert("RGB") for box in boxes]


@pytest.fixture(scope="session")
def cifar() -> list[Image.Image]:
    """300 CIFAR-10 test images, 32 px."""
    return sheet("cifar10")


@pytest.fixture(scope="session")
def cifar_folder(tmp_path_factory: pytest.TempPathFactory, cifar: list[Image.Image]) -> Path:
    """The same images as class folders of PNG files, split into train (240) and test (60)."""
    root = tmp_path_factory.mktemp("images")
    about = json.loads((DATA / "cifar10.json").read_text())
    for i, image in enumerate(cifar):
        split = "test" if i % 5 == 4 else "train"
        folder = root / split / about["names"][about["labels"][i]]
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{i:04d}.png")
    return root


@pytest.fixture(scope="session")
def bundle_path(tmp_path_factory: pytest.TempPathFactory, cifar_folder: Path) -> Path:
    """A small cascade of three experts from the real training loop, with thumbnails: <store>/small/1.

    It is trained once: pytest's parallel workers share it.
    """
    from training import heads, pipeline
    from training.cli import Watch
    from training.recipe import Recipe
    from training.run import begin

    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "trained"
    bundle = root / "store" / "small" / "1"
    root.mkdir(exist_ok=True)
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if bundle.exists():
            return bundle
        recipe = Recipe(
            str(cifar_folder),
            size=32,
            mask_from="blocks.6",
            steps=24,
            expert_steps=12,
            batch=32,
            local_crops=0,
            prototypes=40,
            queue=64,
            clusters=3,
            router="centroid",
            dim=32,
            bank=100,
            lr=0.2,
        )
        run = begin(root / "run", recipe, Watch(None))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(heads, "PENALTIES", (1.0,))  # to choose one takes most of the time of this training
            return pipeline.train(run, bundle, thumbnails=True)


@pytest.fixture(autouse=True)
def fresh_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test finds the hundred labels of bundles taken by those of the tests before it."""
    from cascade import metrics

    names = BusiestNames("bundle", metrics.bundle_label.metrics, metrics.MOST_NAMES)
    monkeypatch.setattr(metrics, "bundle_label", names)


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(0)
