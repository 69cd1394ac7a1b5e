"""Rebuild the samples of this folder: `python -m tests.data.make` (see README.md)."""

import json
import re
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image

from training.data.arrays import CLASSES, load

HERE = Path(__file__).parent
COLUMNS, ROWS = 20, 15
CUSTOMERS = {"objects": "cifar10", "clothes": "fashion-mnist", "groceries": "fruit", "digits": "digits"}
DRAWN, SIDE_BY_SIDE, SEED = 100, 10, 0
STRANGERS = {"sklearn.datasets": "images/china.jpg", "matplotlib": "mpl-data/sample_data/grace_hopper.jpg"}


def sheet(images: np.ndarray, columns: int) -> Image.Image:
    """Images uint8 [N, S, S] or [N, S, S, 3] side by side, row by row."""
    rows, side = len(images) // columns, images.shape[1]
    grid = images.reshape(rows, columns, side, side, -1).swapaxes(1, 2).reshape(rows * side, columns * side, -1)
    return Image.fromarray(grid.squeeze())


def contact_sheet(name: str, stem: str) -> None:
    images, labels = load(name, "test")
    sheet(np.asarray(images[: COLUMNS * ROWS]), COLUMNS).save(HERE / f"{stem}.png", optimize=True)
    sample = {"labels": labels[: COLUMNS * ROWS].tolist(), "names": CLASSES[name]}
    (HERE / f"{stem}.json").write_text(json.dumps(sample) + "\n")


def photos() -> None:
    """The first CIFAR-10 test image of each class."""
    images, labels = load("cifar10", "test")
    for label, name in enumerate(CLASSES["cifar10"]):
        index = int(np.argmax(labels == label))
        Image.fromarray(images[index]).save(HERE / "photos" / f"{name}-{index:04d}.png", optimize=True)


def customers() -> None:
    """For the demo: test images of each customer of its store, drawn by a seed, and photos that belong to nobody."""
    folder, names = HERE / "customers", {}
    folder.mkdir(exist_ok=True)
    for customer, name in sorted(CUSTOMERS.items()):
        images, labels = load(name, "test")
        rows = np.random.default_rng(SEED).choice(len(images), DRAWN, replace=False)
        names[customer] = [re.sub(r"\W+", "-", CLASSES[name][label]) for label in labels[rows].tolist()]
        drawn = sheet(np.asarray(images[rows]), SIDE_BY_SIDE)
        drawn.save(folder / f"{customer}.webp", lossless=images.shape[1] <= 32, quality=80, method=6)
    (folder / "labels.json").write_text(json.dumps(names) + "\n")
    nobody = folder / "nobody"
    nobody.mkdir(exist_ok=True)
    for package, path in STRANGERS.items():
        with Image.open(str(files(package) / path)) as photo:
            small = photo.convert("RGB")
        small.thumbnail((160, 160), Image.Resampling.LANCZOS)
        small.save(nobody / f"{Path(path).stem}.jpg", quality=85)


if __name__ == "__main__":
    (HERE / "photos").mkdir(exist_ok=True)
    contact_sheet("cifar10", "cifar10")
    contact_sheet("fashion-mnist", "fashion_mnist")
    photos()
    customers()
