"""Data sets by name: torchvision's files, the cache of arrays, and errors."""

from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
from torchvision import datasets

from cascade.errors import CascadeError
from tests.helpers.datasets import check_cifar10, check_fashion_mnist, idx_fashion_mnist, torchvision_cifar10
from training.data import dataset


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data sets' folder. The network fails whatever the machine has."""

    def offline(*_: object, **__: object) -> None:
        raise URLError("no route")

    monkeypatch.setenv("CASCADE_DATA", str(tmp_path / "store"))
    monkeypatch.setattr(datasets.CIFAR10, "download", offline)
    monkeypatch.setattr(datasets.FashionMNIST, "download", offline)
    return tmp_path / "store"


def test_cifar10_from_torchvisions_files(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torchvision_cifar10(store, monkeypatch)
    check_cifar10()


def test_fashion_mnist_from_torchvisions_files(store: Path) -> None:
    idx_fashion_mnist(store / "FashionMNIST/raw", packed=False)
    check_fashion_mnist()


@pytest.mark.parametrize("name", ["cifar10", "fashion-mnist"])
def test_a_data_set_that_is_nowhere_says_what_was_tried(store: Path, name: str) -> None:
    with pytest.raises(CascadeError) as caught:
        dataset.load(name, "train")
    message = str(caught.value)
    assert message.startswith(f"cannot get {name}: put torchvision's files into {store} or set CASCADE_DATA")
    assert "no route" in message and "\n" not in message


def test_groceries_name_the_command_that_gets_them(store: Path) -> None:
    with pytest.raises(CascadeError, match="run python -m benchmarks.datasets groceries"):
        dataset.load("groceries", "train")


def test_a_data_set_is_kept_whole_or_not_at_all(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    idx_fashion_mnist(store / "FashionMNIST/raw", packed=False)
    save, saved = np.save, list[int]()

    def failing(*args: object, **kwargs: object) -> None:
        if len(saved) == 2:
            raise OSError("disk full")
        saved.append(1)
        save(*args, **kwargs)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(np, "save", failing)
        dataset.load("fashion-mnist", "train")
    assert [p.name for p in store.iterdir()] == ["FashionMNIST"]
    check_fashion_mnist()
