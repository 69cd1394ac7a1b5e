"""CIFAR-10, CIFAR-100 and Fashion-MNIST by name, as arrays.

They are stored in $CASCADE_DATA as .npy files, which later runs map from disk. If these are missing, torchvision reads
its own files in that folder, or downloads them. Groceries (the fruit of the Grocery Store Dataset, arXiv 1901.00711),
fruit (the same photos, larger, in five classes) and solar cells (ELPV, doi 10.1016/j.solener.2019.02.067) are read from
.npy files only.
"""

import os
import socket
import tempfile
from pathlib import Path

import numpy as np

from cascade import atomic
from cascade.cache import cache_folder
from cascade.errors import CascadeError, brief

Arrays = dict[str, np.ndarray]  # "train-images", "train-labels", "test-images", "test-labels"

CIFAR100 = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
    castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
    elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
    man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
    pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
    skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
    tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""
CLASSES = {
    "cifar10": ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
    "cifar100": CIFAR100.split(),
    "fashion-mnist": [
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ],
    "digits": list("0123456789"),
    "fruit": ["Apple", "Melon", "Orange", "Pear", "Satsumas"],
    "groceries": [
        "Anjou",
        "Cantaloupe",
        "Conference",
        "Galia-Melon",
        "Golden-Delicious",
        "Granny-Smith",
        "Honeydew-Melon",
        "Kaiser",
        "Orange",
        "Pink-Lady",
        "Red-Delicious",
        "Royal-Gala",
        "Satsumas",
        "Watermelon",
    ],
    "solar-cells": ["mono functional", "mono defective", "poly functional", "poly defective"],
}
TORCHVISION = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "fashion-mnist": "FashionMNIST"}
TIMEOUT = 20  # seconds without a byte; torchvision sets no timeout and hangs for minutes if packets are dropped


class SourceError(CascadeError):
    """A named data set is not on disk and cannot be downloaded."""


def root() -> Path:
    """The folder of the data sets: $CASCADE_DATA, or ~/.cache/cascade/data."""
    folder = os.environ.get("CASCADE_DATA")
    return Path(folder).expanduser() if folder else cache_folder() / "data"


def load(name: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of one split, mapped from disk.

    Returns:
        uint8 [N, 32, 32, 3], [N, 28, 28] (Fashion-MNIST, digits), [N, 128, 128, 3] (groceries), [N, 192, 192, 3]
        (fruit) or [N, 128, 128] (solar cells), and int64 [N].

    Raises:
        SourceError: the data set is not on disk and torchvision cannot download it.
    """
    folder = root() / name
    if not folder.is_dir():
        keep(_fetch(name), name)
    images = np.load(folder / f"{split}-images.npy", mmap_mode="r", allow_pickle=False)
    return images, np.load(folder / f"{split}-labels.npy", allow_pickle=False)


def keep(data: Arrays, name: str) -> None:
    """Write the arrays of data set ``name`` below `root` atomically."""
    folder = root() / name
    try:
        with atomic.folder(folder) as beside:
            for file, array in data.items():
                np.save(beside / f"{file}.npy", array, allow_pickle=False)
    except OSError:
        if not folder.is_dir():  # otherwise another process was faster, and wrote the same files
            raise


def torchvision_arrays(name: str, folder: Path, download: bool) -> Arrays:
    """Read both splits with torchvision, which checks the MD5 of CIFAR's pickles before it loads them."""
    from torchvision import datasets

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        dataset = getattr(datasets, TORCHVISION[name])
        splits = {split: dataset(folder, split == "train", download=download) for split in ("train", "test")}
    finally:
        socket.setdefaulttimeout(before)
    return {
        **{f"{split}-images": np.asarray(part.data, np.uint8) for split, part in splits.items()},
        **{f"{split}-labels": np.asarray(part.targets, np.int64) for split, part in splits.items()},
    }


def _fetch(name: str) -> Arrays:
    if name not in TORCHVISION:
        raise SourceError(f"{name} is not in {root()}: run python -m benchmarks.datasets {name}, or set CASCADE_DATA")
    reasons = []
    for way, download in (("its files there", False), ("its download", True)):
        with tempfile.TemporaryDirectory(prefix="cascade-data-") as temporary:
            try:
                return torchvision_arrays(name, Path(temporary) if download else root(), download)
            except Exception as error:  # torchvision raises many types
                reasons.append(f"{way}: {brief(error)}")
    raise SourceError(
        f"cannot get {name}: put torchvision's files into {root()} or set CASCADE_DATA to where they are"
        f" (tried {'; '.join(reasons)})"
    )
