"""Which files below a folder are images that can be read; every one is decoded to know."""

import hashlib
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from rich.console import Console
from rich.progress import track

import cascade
from cascade import atomic
from cascade.model.preprocessing import LIMITS, ImageError, read
from training.data.arrays import root

T = TypeVar("T")
R = TypeVar("R")

# Files named so are taken for images. Not all can be decoded: better named as left out than passed over.
SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".avif")
CHUNK = 1024  # images in the threads' queue at a time

log = logging.getLogger(__name__)


def walk(folder: Path) -> list[str]:
    """Every image file at any depth, sorted; hidden files and folders are passed over, links are followed."""
    names, seen = [], set()
    for base, folders, files in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(base))
        folders[:] = sorted(f for f in folders if f[0] != "." and os.path.realpath(Path(base, f)) not in seen)
        names += [Path(base, f) for f in files if f[0] != "." and f.lower().endswith(SUFFIXES)]
    return sorted(path.relative_to(folder).as_posix() for path in names)


def scan(folder: Path, names: list[str]) -> dict[str, tuple[str, str]]:
    """Decode every file: name -> (digest of the pixels, reason why it is broken); one of the two is empty.

    Verdicts are remembered beside the data sets, by size and time of each file, so that only the first of the
    many starts of a training decodes the folder.
    """
    key = f"{folder.resolve()} {LIMITS} {cascade.__version__}"
    memo_file = root() / "scans" / f"{hashlib.sha256(os.fsencode(key)).hexdigest()[:16]}.json"
    memo = json.loads(memo_file.read_text()) if memo_file.exists() else {}
    stamps = {name: _stamp(folder / name) for name in names}
    new = [name for name in names if memo.get(name, [None])[0] != stamps[name]]

    def verdict(name: str) -> tuple[str, str]:
        try:
            return digest(np.asarray(read(folder / name))), ""
        except ImageError as error:
            return "", str(error)

    if new:
        verdicts = zip(new, threaded(verdict, new, "reading images"), strict=True)
        memo |= {name: [stamps[name], *found] for name, found in verdicts}
        _remember(memo_file, memo)
    return {name: (memo[name][1], memo[name][2]) for name in names}


def _stamp(path: Path) -> list[int]:
    try:
        status = path.stat()
    except OSError:  # e.g. a dangling link; `read` will say so
        return []
    return [status.st_size, status.st_mtime_ns]


def _remember(file: Path, memo: dict[str, list]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic.file(file) as beside:
            beside.write_text(json.dumps(memo))
    except OSError as error:
        log.warning("cannot write %s (%s): the next start reads every image again", file, error.strerror)


def digest(pixels: np.ndarray) -> str:
    """A hash of shape and pixels."""
    return hashlib.blake2b(f"{pixels.shape}".encode() + pixels.tobytes(), digest_size=16).hexdigest()


def threaded(work: Callable[[T], R], items: Sequence[T], what: str) -> Iterator[R]:
    """`work` of every item, in order, with a progress bar; in threads, as Pillow lets go of Python's lock."""
    pool, console = ThreadPoolExecutor(os.cpu_count()), Console(stderr=True)
    try:
        chunks = (items[i : i + CHUNK] for i in range(0, len(items), CHUNK))
        results: Iterable[R] = itertools.chain.from_iterable(pool.map(work, chunk) for chunk in chunks)
        yield from track(results, what, len(items), console=console, transient=True, disable=not console.is_terminal)
    finally:
        pool.shutdown(cancel_futures=True)
