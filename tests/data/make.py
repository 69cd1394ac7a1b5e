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
EACH, SEED = 5, 0
STRANGERS = {"sklearn.datasets": "images/china.jpg", "matplotlib": "mpl-data/sample_data/grace_hopper.jpg"}


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


def customers() -> None:
    """For the demo: test images of each customer of its store, drawn by a seed, and photos that belong to nobody."""
    for customer, name in CUSTOMERS.items():
        folder = HERE / "customers" / customer
        folder.mkdir(parents=True, exist_ok=True)
        images, labels = load(name, "test")
        for i in np.sort(np.random.default_rng(SEED).choice(len(images), EACH, replace=False)).tolist():
            label = re.sub(r"\W+", "-", CLASSES[name][int(labels[i])])
            Image.fromarray(images[i]).save(folder / f"{label}-{i:05d}.png", optimize=True)
    nobody = HERE / "customers" / "nobody"
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
