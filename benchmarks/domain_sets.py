"""The domains of ``benchmarks.domains``: their images, and a bundle for each, trained as a customer would."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.accuracy import BACKBONES
from cascade.bundle.format import Bundle, read
from cascade.engine.executors import Executor
from cascade.model.domain import pooled
from cascade.model.preprocessing import Preprocessing
from training import pipeline
from training.cli import Watch
from training.data import arrays
from training.recipe import Recipe
from training.run import Run, begin, read_json, write_json

SIZE, STAGE = 64, "blocks.4"
DOMAINS = {
    "animals": ("cifar10", ["bird", "cat", "deer", "dog", "frog", "horse"]),
    "vehicles": ("cifar10", ["airplane", "automobile", "ship", "truck"]),
    "tops": ("fashion-mnist", ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Shirt"]),
    "shoes and bags": ("fashion-mnist", ["Sandal", "Sneaker", "Ankle boot", "Bag"]),
    "digits": ("digits", list("0123456789")),
    "groceries": ("groceries", arrays.CLASSES["groceries"]),
    "mono cells": ("solar-cells", ["mono functional", "mono defective"]),
    "poly cells": ("solar-cells", ["poly functional", "poly defective"]),
}
"""Data set and classes of each domain, in the order of their arrival."""
JOINT = "joint"  # the folder and the bundle of all domains together
TRAIN, TEST = 1500, 300  # images of a domain
BATCH = 32


@dataclass(frozen=True)
class HeldOut:
    """The test images of a domain and their classes."""

    images: list[Image.Image]
    classes: list[str]


@dataclass(frozen=True)
class Setting:
    """How all bundles of one seed are trained.

    Attributes:
        folder: of the images, and of all runs. names: the domains, in the order of their arrival.
        steps: of each domain; -1: the default of ``cascade train`` for the number of images.
    """

    folder: Path
    names: tuple[str, ...]
    watch: Watch
    steps: int
    seed: int = 0
    backbone: str = next(iter(BACKBONES))
    mask_from: str = STAGE

    @property
    def root(self) -> Path:
        """The folder of the bundles and runs of this setting, for all seeds."""
        steps = "converged" if self.steps < 0 else f"{self.steps}-steps"
        return self.folder / f"{self.backbone}-{self.mask_from}-{steps}"

    def run(self, name: str, suffix: str = "") -> Run:
        """The run of a training on one domain, or on all (``JOINT``) for their total steps; it resumes."""
        recipe = Recipe(
            str(self.folder / name),
            backbone=self.backbone,
            source=BACKBONES[self.backbone],
            size=SIZE,
            labels=True,
            mask_from=self.mask_from,
            steps=self.steps * len(self.names) if name == JOINT and self.steps > 0 else self.steps,
            bank=0,
            seed=self.seed,
        )
        return begin(self.root / "runs" / f"{name}{suffix}-{self.seed}", recipe, self.watch)

    def train(self, name: str, *, frozen: bool = False) -> Bundle:
        """The bundle of one or all domains, trained by ``cascade train``; a finished one is read."""
        out = self.path(name, frozen=frozen)
        if not out.exists():
            run = self.run(name, "-frozen" if frozen else "")
            self.watch.say(run.folder.name)
            began = time.perf_counter()
            pipeline.train(run, out, frozen=frozen)
            write_json(run.folder / "seconds.json", round(time.perf_counter() - began, 2))
        return read(out)

    def path(self, name: str, *, frozen: bool = False) -> Path:
        """Where the bundle of a domain is."""
        return self.root / ("frozen" if frozen else "store") / name / str(self.seed + 1)

    def seconds(self, name: str, *, frozen: bool = False) -> float:
        """How long the training of a bundle took, from its images on; less than all of it if it was interrupted."""
        seconds: float = read_json(self.run(name, "-frozen" if frozen else "").folder / "seconds.json")
        return seconds

    def bytes(self, name: str, *, frozen: bool = False) -> int:
        """Bytes of a bundle on disk."""
        return sum(file.stat().st_size for file in self.path(name, frozen=frozen).iterdir())

    def held_out(self) -> dict[str, HeldOut]:
        """The test images of each domain."""
        sets = {}
        for name in self.names:
            files = sorted((self.folder / name / "test").glob("*/*.png"))
            images = [Image.open(file).convert("RGB") for file in files]
            sets[name] = HeldOut(images, [file.parent.name for file in files])
        return sets


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
            for path in (folder / name / split / label, folder / JOINT / split / f"{name} {label}"):
                path.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.asarray(images[row])).convert("RGB").save(path / f"{row:06d}.png")


@torch.inference_mode()
def activations(executor: Executor, preprocessing: Preprocessing, images: Sequence[Image.Image], stop: int) -> Tensor:
    """Of the plain backbone: pooled activations before stage ``stop``, float32 [N, D]."""
    executor.swap(None)
    transform = preprocessing.transform()
    parts = [torch.stack([transform(x) for x in images[i : i + BATCH]]) for i in range(0, len(images), BATCH)]
    return torch.cat([pooled(executor.run(x, 0, stop)) for x in parts])
