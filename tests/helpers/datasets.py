"""Small data sets of real images in the layouts of their sources."""

import gzip
import hashlib
import json
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from tests.helpers.paths import DATA
from training.data import dataset

CIFAR10 = json.loads((DATA / "cifar10.json").read_text())


def photo(i: int) -> Image.Image:
    """CIFAR-10's test image i."""
    y, x = divmod(i, 20)
    return Image.open(DATA / "cifar10.png").crop((32 * x, 32 * y, 32 * x + 32, 32 * y + 32))


def put(folder: Path, names: list[str]) -> Path:
    """A real photo under each name."""
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        photo(i).save(folder / name)
    return folder


def torchvision_cifar10(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four photos a batch in the layout of cifar-10-python.tar.gz, whose files torchvision knows by md5."""
    base = folder / "cifar-10-batches-py"
    base.mkdir(parents=True)

    def write(name: str, content: dict) -> list[str]:
        (base / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((base / name).read_bytes()).hexdigest()]

    def batch(name: str, k: int) -> list[str]:
        pixels = np.stack([np.asarray(photo(4 * k + i)).transpose(2, 0, 1).ravel() for i in range(4)])
        return write(name, {"data": pixels, "labels": CIFAR10["labels"][4 * k : 4 * k + 4]})

    monkeypatch.setattr(datasets.CIFAR10, "train_list", [batch(f"data_batch_{k + 1}", k) for k in range(5)])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [batch("test_batch", 5)])
    name, md5 = write("batches.meta", {"label_names": CIFAR10["names"]})
    monkeypatch.setattr(datasets.CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})


def idx_fashion_mnist(folder: Path, packed: bool) -> None:
    """Twenty real images as idx files, gzipped as Debian has them or plain as torchvision does."""
    folder.mkdir(parents=True)
    sheet = np.asarray(Image.open(DATA / "fashion_mnist.png"))
    rows = sheet[:28].reshape(28, 20, 28).swapaxes(0, 1)
    labels = np.array(json.loads((DATA / "fashion_mnist.json").read_text())["labels"][:20], np.uint8)
    for part, span in (("train", slice(0, 15)), ("t10k", slice(15, 20))):
        n = len(labels[span])
        files = {
            f"{part}-images-idx3-ubyte": struct.pack(">4i", 0x803, n, 28, 28) + rows[span].tobytes(),
            f"{part}-labels-idx1-ubyte": struct.pack(">2i", 0x801, n) + labels[span].tobytes(),
        }
        for name, content in files.items():
            (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)


def check_cifar10() -> None:
    train, test = dataset.load("cifar10", "train"), dataset.load("cifar10", "test")
    assert (len(train), len(test)) == (20, 4)
    assert train.names[7] == "cifar10/train/00007" and test.names[3] == "cifar10/test/00003"
    assert train.classes == test.classes == CIFAR10["names"]
    assert train.labels is not None and train.labels.tolist() == CIFAR10["labels"][:20]
    assert test.labels is not None and test.labels.tolist() == CIFAR10["labels"][20:24]
    assert train.open(7) == photo(7)
    assert test.open(3) == photo(23)


def check_fashion_mnist() -> None:
    train, test = dataset.load("fashion-mnist", "train"), dataset.load("fashion-mnist", "test")
    assert (len(train), len(test)) == (15, 5)
    names = json.loads((DATA / "fashion_mnist.json").read_text())
    assert test.classes == names["names"] == datasets.FashionMNIST.classes
    assert test.labels is not None and test.labels.tolist() == names["labels"][15:20]
    image = np.asarray(test.open(0))
    assert image.shape == (28, 28, 3) and (image == image[..., :1]).all()
    assert np.array_equal(image[..., 0], np.asarray(Image.open(DATA / "fashion_mnist.png"))[:28, 420:448])
