"""Rebuild the samples of this folder: `python -m tests.data.make` (see README.md)."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from training.data.arrays import CLASSES, load

HERE = Path(__file__).parent
COLUMNS, ROWS = 20, 15


def contact_sheet(name: str, stem: str) -> None:
    images, labels = load(name, "test")
    first = np.asarray(images[: COLUMNS * ROWS])
    side = first.shape[1]
    grid = first.reshape(ROWS, COLUMNS, side, side, -1).swapaxes(1, 2).reshape(ROWS * side, COLUMNS * side, -1)
    Image.fromarray(grid.squeeze()).save(HERE / f"{stem}.png", optimize=True)
    sample = {"labels": labels[: COLUMNS * ROWS].tolist(), "names": CLASSES[name]}
    (HERE / f"{stem}.json").write_text(json.dumps(sample) + "\n")


def photos() -> None:
    """The first CIFAR-10 test image of each class."""
    images, labels = load("cifar10", "test")
    for label, name in enumerate(CLASSES["cifar10"]):
        index = int(np.argmax(labels == label))
        Image.fromarray(images[index]).save(HERE / "photos" / f"{name}-{index:04d}.png", optimize=True)


if __name__ == "__main__":
    (HERE / "photos").mkdir(exist_ok=True)
    contact_sheet("cifar10", "cifar10")
    contact_sheet("fashion-mnist", "fashion_mnist")
    photos()
