"""Images for training and evaluation: from a folder, or a published data set by name.

`load` finds them, `cache` and `cache_evaluation` decode them once into one array, `batches` gives the indices of each
step.
"""

import hashlib
import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from cascade.errors import CascadeError, printable
from cascade.model.decoding import read
from cascade.model.preprocessing import Preprocessing
from training.data import arrays, published
from training.data.array_cache import stored
from training.data.scan import digest, scan, threaded, walk

Split = Literal["train", "test"]

HOLD_OUT = 0.2
TRAIN = ("train", "training")  # names of split folders, in lower case
TEST = ("test", "testing", "val", "valid", "validation", "eval", "evaluation", "dev")  # the first that exists is used
LIKE_SPLIT = re.compile(rf"(?:^|[^a-z])(?:{'|'.join((*TRAIN, *TEST))})(?:[^a-z]|$)", re.IGNORECASE)
NAMES = (*arrays.CLASSES, *published.PLACES)
NAMED = 20  # broken images named in the warning; `Images.broken` has them all

log = logging.getLogger(__name__)


class DataError(CascadeError):
    """There are no images to work with, or their folders are ambiguous."""


@dataclass(frozen=True, eq=False)
class Images:
    """An ordered set of images, decoded when they are opened.

    Attributes:
        names: stable ids: the path inside the folder, or e.g. "cifar10/train/00042".
        labels: int64 [N], indices into `classes`, or None.
        classes: class names, empty without labels. The same for both splits.
        items: paths (object [N]) or pixels (uint8 [N, H, W] or [N, H, W, 3]).
        digests: a hash of each image's pixels.
        broken: name and reason of each image that was left out.
    """

    names: list[str]
    labels: np.ndarray | None
    classes: list[str]
    items: np.ndarray = field(repr=False)
    digests: list[str] = field(repr=False)
    broken: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)

    def open(self, i: int) -> Image.Image:
        """Image i, RGB and upright."""
        item = self.items[i]
        return read(item) if isinstance(item, Path) else Image.fromarray(item).convert("RGB")

    def take(self, indices: Sequence[int] | np.ndarray) -> "Images":
        """These images only, in this order."""
        return replace(
            self,
            names=[self.names[i] for i in indices],
            labels=None if self.labels is None else self.labels[indices],
            items=self.items[indices],
            digests=[self.digests[i] for i in indices],
        )

    def fingerprint(self) -> str:
        """SHA-256 over names, labels and pixels, in order: equal only for the same data."""
        labels = None if self.labels is None else self.labels.tolist()
        content = json.dumps([self.names, self.classes, labels, self.digests])
        return hashlib.sha256(content.encode()).hexdigest()


def load(source: str | Path, split: Split, limit: int | None = None, seed: int = 0) -> Images:
    """The training or the test images of a folder, or of a data set by name (``NAMES``).

    Subfolders with usual names (`train` and `test`, `valid`, ... in any case) are the splits. Without them a fixed
    fifth is held out as test, by the hash of the names and not by `seed`. Labels come from the first folder below, if
    every image is in one and there are at least two. Every file is decoded once; a warning names those left out.

    Args:
        limit: maximum number of images, drawn with `seed`, evenly over the classes; a larger limit only adds images.

    Raises:
        DataError: no such folder, no image left, or subfolders that look like splits and are not understood.
        SourceError: a named data set cannot be found or downloaded.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}: ask for at least one image")
    if str(source) in arrays.CLASSES:
        images = _arrays(str(source), split)
    else:
        images = _published(str(source), split) if str(source) in published.PLACES else _folder(Path(source), split)
    if limit is None or limit >= len(images):
        return images
    labels = np.zeros(len(images), np.int64) if images.labels is None else images.labels
    return images.take(np.sort(evenly(labels, seed)[:limit]))


def class_folders(folder: Path) -> Images:
    """All images of a folder, with one class per subfolder, at least one; nothing is held out.

    Splits are recognized as in ``load``, and joined.

    Raises:
        DataError: no such folder, no subfolder with images, or images outside of the subfolders.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: name one with a subfolder of images for each class")
    names, closed = walk(folder)
    depth = 1 if split_folders(folder) else 0
    loose = [name for name in names if name.count("/") <= depth]
    if loose or not names:
        raise DataError(f"put the images in {folder} into a subfolder for each class ({_some(loose) or 'none there'})")
    good, images = _decodable(folder, names, "train", closed)
    found = [name.split("/")[depth] for name in good]
    classes = sorted(set(found))
    labels = np.array([classes.index(name) for name in found], np.int64)
    return replace(images, labels=labels, classes=[_text(name) for name in classes])


def evenly(labels: np.ndarray, seed: int) -> np.ndarray:
    """Shuffle the rows of labels [N] with ``seed``, balanced: the k-th of every class before the (k+1)-th of any."""
    order = np.random.default_rng(seed).permutation(len(labels))
    shuffled = labels[order]
    turn = np.empty(len(order), np.int64)
    for label in np.unique(shuffled):
        turn[shuffled == label] = np.arange((shuffled == label).sum())
    return order[np.argsort(turn, kind="stable")]


def _arrays(name: str, split: Split) -> Images:
    pixels, labels = arrays.load(name, split)
    names = [f"{name}/{split}/{i:05d}" for i in range(len(pixels))]
    return Images(names, labels, arrays.CLASSES[name], pixels, [digest(image) for image in pixels])


def _published(name: str, split: Split) -> Images:
    files, labels, classes = published.listing(name, split)
    folder = arrays.root() / published.PLACES[name].folder
    names = [path.relative_to(folder).as_posix() for path in files]
    good, images = _decodable(folder, names, split)
    label = dict(zip(names, labels, strict=True))
    return replace(images, labels=np.array([label[n] for n in good], np.int64), classes=classes)


def _folder(folder: Path, split: Split) -> Images:
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: name a folder of images, or {', '.join(NAMES)}")
    names, closed = walk(folder)
    splits = split_folders(folder)
    depth = 1 if splits else 0
    if splits:
        names = [name for name in names if name.split("/")[0] in splits.values()]
        mine = [name for name in names if name.split("/")[0] == splits[split]]
    else:
        by_hash = sorted(names, key=lambda name: hashlib.sha256(os.fsencode(name)).digest())
        held_out = set(by_hash[: max(1, round(HOLD_OUT * len(names)))] if len(names) > 1 else [])
        mine = [name for name in names if (name in held_out) == (split == "test")]
    if not mine:
        raise DataError(f"no {split} images in {folder}: put JPEG, PNG or WebP files there")

    good, images = _decodable(folder, mine, split, closed)
    classes = _classes(folder, names, depth)
    if not classes:
        return images
    index = {name: i for i, name in enumerate(classes)}
    labels = np.array([index[name.split("/")[depth]] for name in good], np.int64)
    return replace(images, labels=labels, classes=[_text(name) for name in classes])


def split_folders(folder: Path) -> dict[Split, str]:
    """The subfolders that are a folder's splits, by their usual names in any case; empty if it has none.

    Raises:
        DataError: several subfolders look like splits, but not like one for training and one for testing.
    """
    subfolders = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if not (similar := [name for name in subfolders if LIKE_SPLIT.search(name)])[1:]:
        return {}  # a single one may be a class, of trains
    train = [name for name in subfolders if name.lower() in TRAIN]
    tests = [[name for name in subfolders if name.lower() == usual] for usual in TEST]
    test = next((names for names in tests if names), [])
    if len(train) != 1 or len(test) != 1:
        some = printable(", ".join(similar))
        raise DataError(f"{folder} has folders that look like splits ({some}): name them train and test")
    if unused := [name for name in subfolders if name not in (*train, *test)]:
        log.warning("%s: training uses %s, tests use %s; left out: %s", folder, train[0], test[0], _some(unused))
    return {"train": train[0], "test": test[0]}


def _classes(folder: Path, names: list[str], depth: int) -> list[str]:
    """The class folders, sorted; none if there are fewer than two, or images outside of them."""
    classes = sorted({name.split("/")[depth] for name in names if name.count("/") > depth})
    if len(classes) < 2:
        return []
    if stray := [name for name in names if name.count("/") <= depth]:
        log.warning(
            "%s: labels are not used, as %d images lie beside the class folders (%s): move them into one",
            folder, len(stray), _some(stray),
        )  # fmt: skip
        return []
    return classes


def _decodable(folder: Path, names: list[str], split: Split, closed: Sequence[str] = ()) -> tuple[list[str], Images]:
    """The names of the files that can be read, and their images without labels; a warning names the others.

    Args:
        closed: subfolders that could not be listed.
    """
    verdicts = scan(folder, names)
    broken = [(_text(name), "the folder cannot be listed: check its permissions") for name in closed]
    broken += [(_text(name), reason) for name, (_, reason) in verdicts.items() if reason]
    good = [name for name in names if not verdicts[name][1]]
    if not good:
        name, reason = broken[-1]
        raise DataError(f"none of the {len(names)} {split} images in {folder} can be read; {name}: {reason}")
    if broken:
        lines = [f"left out {len(broken)} of {len(names) + len(closed)} {split} images and folders in {folder}:"]
        lines += [f"  {printable(name)}: {printable(reason)}" for name, reason in broken[:NAMED]]
        lines += [f"  and {len(broken) - NAMED} more"] if len(broken) > NAMED else []
        log.warning("\n".join(lines))
    items = np.array([folder / name for name in good], object)
    digests = [verdicts[name][0] for name in good]
    return good, Images([_text(name) for name in good], None, [], items, digests, broken)


def _text(name: str) -> str:
    r"""A file name as printable UTF-8; other bytes become ``\xff``."""
    return os.fsencode(name).decode(errors="backslashreplace")


def _some(names: Sequence[str]) -> str:
    return printable(", ".join(names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def cache(images: Images, size: int, path: Path | None = None) -> np.ndarray:
    """Decode every image once: uint8 [N, 3, size, size], the shorter side resized to `size` (bicubic,
    antialiased), the longer one cropped to its center.

    In memory; or, with a `path` such as run/images.npy, mapped from a file next to it whose name contains the size and
    the images' fingerprint. The file is written atomically; an interrupted run is resumed.
    """

    def square(i: int) -> np.ndarray:
        image = ImageOps.fit(images.open(i), (size, size), Image.Resampling.BICUBIC)
        return np.asarray(image).transpose(2, 0, 1)

    return _decoded(images, size, square, str(size), path)


def cache_evaluation(images: Images, preprocessing: Preprocessing, path: Path | None = None) -> np.ndarray:
    """Decode every image once, resized and cropped by the evaluation transform: uint8 [N, 3, S, S].

    ``preprocessing.normalize`` turns them into the backbone's input, equal to ``preprocessing.transform``. Files are
    named and written as in `cache`.
    """
    resize = preprocessing.geometry()

    def view(i: int) -> np.ndarray:
        return np.asarray(resize(images.open(i))).transpose(2, 0, 1)

    settings = hashlib.sha256(json.dumps(preprocessing.to_json(), sort_keys=True).encode()).hexdigest()[:8]
    return _decoded(images, preprocessing.size, view, f"eval-{settings}", path)


def _decoded(images: Images, size: int, view: Callable[[int], np.ndarray], name: str, path: Path | None) -> np.ndarray:
    everything = range(len(images))
    shape = (len(images), 3, size, size)
    if path is None:
        pixels = np.empty(shape, np.uint8)
        for i, one in enumerate(threaded(view, everything, "decoding")):
            pixels[i] = one
        return pixels

    file = path.with_name(f"{path.stem}-{name}-{images.fingerprint()[:16]}.npy")
    return stored(file, shape, np.dtype("u1"), lambda done: threaded(view, everything[done:], "decoding"))


def steps_per_epoch(n: int, batch: int) -> int:
    """Full batches in an epoch (the rest is dropped), at least one."""
    return max(1, n // batch)


def batches(n: int, batch: int, seed: int, start_step: int = 0) -> Iterator[np.ndarray]:
    """Yield indices int64 [batch] into n images for step `start_step`, `start_step` + 1 and so on, forever.

    A step's batch depends only on `seed` and the step, so training can resume at any step with the same result.
    Each epoch is a new permutation. If n < batch, an epoch is one batch that repeats images.
    """
    steps = steps_per_epoch(n, batch)
    for epoch in itertools.count(start_step // steps):
        order = np.random.default_rng((seed, epoch)).permutation(n)
        order = np.resize(order, max(n, batch))
        for k in range(start_step % steps if epoch == start_step // steps else 0, steps):
            yield order[k * batch : (k + 1) * batch]
