"""Images for training and evaluation: from a folder, or a published data set by name.

`load` finds them, `cache` decodes them once into one array, `batches` says which of them each step takes.
"""

import hashlib
import itertools
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from cascade.errors import CascadeError
from cascade.model.preprocessing import read
from training.data import arrays, published
from training.data.array_cache import stored
from training.data.scan import digest, scan, threaded, walk

Split = Literal["train", "test"]

HOLD_OUT = 0.2
NAMES = (*arrays.CLASSES, *published.PLACES)
NAMED = 20  # broken images that the warning names; `Images.broken` has them all

log = logging.getLogger(__name__)


class DataError(CascadeError):
    """There are no images to work with."""


@dataclass(frozen=True, eq=False)
class Images:
    """An ordered set of images, decoded when opened.

    Attributes:
        names: stable ids: the path inside the folder, or e.g. "cifar10/train/00042".
        labels: int64 [N], indices into `classes`, or None.
        classes: class names, empty without labels. The same for both splits.
        items: where the pixels are: paths (object [N]) or pixels (uint8 [N, H, W] or [N, H, W, 3]).
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

    A folder's own `train` and `test` (or `val`) subfolders are its splits; without them a fixed fifth, chosen
    by the hash of the names and so never by `seed`, is held out as test. Labels come from the first folder
    below, if every image lies in one and there are at least two. Every file is decoded once; broken ones are
    left out and named.

    Args:
        limit: at most so many, drawn with `seed`, evenly over the classes; a larger one only adds images.

    Raises:
        DataError: no such folder, or no image left. SourceError: a named data set can't be got.
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


def evenly(labels: np.ndarray, seed: int) -> np.ndarray:
    """All rows of labels [N] in an order drawn with ``seed``: the k-th of every class before the (k+1)-th of any."""
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
    label = dict(zip(names, labels, strict=True))
    images = _decodable(folder, names, split)
    return replace(images, labels=np.array([label[n] for n in images.names], np.int64), classes=classes)


def _folder(folder: Path, split: Split) -> Images:
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: name a folder of images, or {', '.join(NAMES)}")
    names = walk(folder)
    test = next((part for part in ("test", "val") if (folder / part).is_dir()), None)
    depth = 0
    if test and (folder / "train").is_dir():
        depth = 1
        names = [name for name in names if name.split("/")[0] in ("train", test)]
        part = "train" if split == "train" else test
        mine = [name for name in names if name.startswith(f"{part}/")]
    else:
        by_hash = sorted(names, key=lambda name: hashlib.sha256(os.fsencode(name)).digest())
        held_out = set(by_hash[: max(1, round(HOLD_OUT * len(names)))] if len(names) > 1 else [])
        mine = [name for name in names if (name in held_out) == (split == "test")]
    if not mine:
        raise DataError(f"no {split} images in {folder}: put JPEG, PNG or WebP files there")

    images = _decodable(folder, mine, split)
    classes = sorted({name.split("/")[depth] for name in names})
    if len(classes) < 2 or any(name.count("/") <= depth for name in names):
        return images
    index = {name: i for i, name in enumerate(classes)}
    labels = np.array([index[name.split("/")[depth]] for name in images.names], np.int64)
    return replace(images, labels=labels, classes=classes)


def _decodable(folder: Path, names: list[str], split: Split) -> Images:
    """Those of the files that can be read, without labels; the others are named in a warning."""
    found = scan(folder, names)
    broken = [(name, reason) for name, (_, reason) in found.items() if reason]
    good = [name for name in names if not found[name][1]]
    if not good:
        name, reason = broken[0]
        raise DataError(f"none of the {len(names)} {split} images in {folder} can be read; {name}: {reason}")
    if broken:
        lines = [f"left out {len(broken)} of {len(names)} {split} images in {folder}:"]
        lines += [f"  {name}: {reason}" for name, reason in broken[:NAMED]]
        lines += [f"  and {len(broken) - NAMED} more"] if len(broken) > NAMED else []
        log.warning("\n".join(lines))
    items = np.array([folder / name for name in good], object)
    return Images(good, None, [], items, [found[name][0] for name in good], broken)


def cache(images: Images, size: int, path: Path | None = None) -> np.ndarray:
    """Every image decoded once: uint8 [N, 3, size, size], the shorter side resized to `size` (bicubic,
    antialiased), the longer one cut to its middle.

    In memory; or, with a `path` such as run/images.npy, mapped from a file beside it whose name tells the
    size and the images' fingerprint too. By that name it is complete or not there; an interrupted start
    leaves a part that the next one continues.
    """

    def square(i: int) -> np.ndarray:
        image = ImageOps.fit(images.open(i), (size, size), Image.Resampling.BICUBIC)
        return np.asarray(image).transpose(2, 0, 1)

    everything = range(len(images))
    shape = (len(images), 3, size, size)
    if path is None:
        pixels = np.empty(shape, np.uint8)
        for i, one in enumerate(threaded(square, everything, "decoding")):
            pixels[i] = one
        return pixels

    file = path.with_name(f"{path.stem}-{size}-{images.fingerprint()[:16]}.npy")
    return stored(file, shape, np.dtype("u1"), lambda done: threaded(square, everything[done:], "decoding"))


def steps_per_epoch(n: int, batch: int) -> int:
    """Whole batches in an epoch (the rest is dropped), at least one."""
    return max(1, n // batch)


def batches(n: int, batch: int, seed: int, start_step: int = 0) -> Iterator[np.ndarray]:
    """Indices int64 [batch] into n images for step `start_step`, `start_step` + 1 and so on, without end.

    A step's batch depends on `seed` and the step alone, so that training goes on anywhere exactly as if
    undisturbed: each epoch is a permutation of its own. Where n < batch, an epoch is one batch that goes
    round the images again.
    """
    steps = steps_per_epoch(n, batch)
    for epoch in itertools.count(start_step // steps):
        order = np.random.default_rng((seed, epoch)).permutation(n)
        order = np.resize(order, max(n, batch))
        for k in range(start_step % steps if epoch == start_step // steps else 0, steps):
            yield order[k * batch : (k + 1) * batch]
