"""Find the images below a folder, and decode each one once to check that it can be read."""

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

import cascade
from cascade import atomic
from cascade.cache import sweep, used
from cascade.cpus import cpu_count
from cascade.model.decoding import LIMITS, ImageError, read
from cascade.offline.files import images_in
from cascade.progress import track
from training.data.arrays import root

T = TypeVar("T")
R = TypeVar("R")

CHUNK = 1024  # images in the threads' queue

log = logging.getLogger(__name__)


def walk(folder: Path) -> tuple[list[str], list[str]]:
    """Image files at any depth, and subfolders that cannot be listed; both relative to ``folder`` and sorted.

    The rules are the same as for ``cascade predict``.
    """
    paths = [Path(path) for path in images_in(str(folder))]
    closed = [path for path in paths if path.is_dir()]
    names, folders = ([p.relative_to(folder).as_posix() for p in some] for some in (set(paths) - set(closed), closed))
    return sorted(names), sorted(folders)


def scan(folder: Path, names: list[str]) -> dict[str, tuple[str, str]]:
    """Decode every file: name -> (digest of the pixels, reason why it is broken); one of the two is empty.

    Results are cached next to the data sets, by each file's size and modification time, so that only the first start of
    a training decodes the folder.
    """
    key = f"{folder.resolve()} {LIMITS} {cascade.__version__}"
    memo_file = root() / "scans" / f"{hashlib.sha256(os.fsencode(key)).hexdigest()[:16]}.json"
    memo = json.loads(memo_file.read_text()) if memo_file.exists() else {}
    used(memo_file)
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
    except OSError:  # e.g. a dangling link; `read` reports it
        return []
    return [status.st_size, status.st_mtime_ns]


def _remember(file: Path, memo: dict[str, list]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        sweep(file.parent, "*.json")
        with atomic.file(file) as temporary:
            temporary.write_text(json.dumps(memo))
    except OSError as error:
        log.warning("cannot write %s (%s): the next start reads every image again", file, error.strerror)


def digest(pixels: np.ndarray) -> str:
    """A hash of shape and pixels."""
    return hashlib.blake2b(f"{pixels.shape}".encode() + pixels.tobytes(), digest_size=16).hexdigest()


def threaded(work: Callable[[T], R], items: Sequence[T], what: str) -> Iterator[R]:
    """Map `work` over the items in threads, since Pillow releases the GIL; results come in order, with progress."""
    pool = ThreadPoolExecutor(cpu_count())
    try:
        chunks = (items[i : i + CHUNK] for i in range(0, len(items), CHUNK))
        results: Iterable[R] = itertools.chain.from_iterable(pool.map(work, chunk) for chunk in chunks)
        yield from track(results, what, len(items))
    finally:
        pool.shutdown(cancel_futures=True)
