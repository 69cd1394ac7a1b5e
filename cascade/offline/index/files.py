"""The folder of an index. An update writes new files and then replaces the card, so a killed one changes nothing.

    INDEX/index.json         the card: About, with the SHA-256 of the other two
          index-3.faiss      FAISS's own format, of the third generation
          rows-3.parquet     one row per image

A reader may be between card and files when an update replaces them; it then reads the card again. FAISS itself parses
its file: open only indexes from sources that you trust.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from errno import ENOENT
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cascade import atomic
from cascade.errors import CascadeError
from cascade.model.heads import faiss
from cascade.offline.index import vectors as kinds
from cascade.offline.index.memory import About, Index
from cascade.offline.job import writing

if TYPE_CHECKING:
    import pyarrow as pa

CARD = "index.json"
ADDING = "adding"
"""Folder of predictions of images that are being added."""


def read(folder: Path, device: str = "cpu") -> Index:
    """Read an index from its folder and check every byte against its card.

    Raises:
        CascadeError: the folder holds no index, or a damaged one.
    """
    about = read_card(folder)
    while True:
        try:
            return _read(folder, about, device)
        except FileNotFoundError as error:
            before, about = about, read_card(folder)
            if about == before:
                raise CascadeError(f"{error.filename} is missing: build the index again") from None
        except OSError as error:
            raise CascadeError(f"{folder} cannot be read ({error})") from error


def read_card(folder: Path) -> About:
    """The card of an index. Raises CascadeError."""
    try:
        card = json.loads((folder / CARD).read_text())
        if card["format"] != About.format:
            raise CascadeError(f"{folder} has a format that this version does not know: build the index again")
        about = About(**card)
        if set(about.sums or ()) != set(names(about)):
            raise ValueError("other files")
    except (OSError, ValueError, TypeError, KeyError) as error:
        message = f"{folder} is no index ({type(error).__name__}): make one with cascade index build"
        raise CascadeError(message) from error
    return about


def names(about: About) -> tuple[str, str]:
    """The names of FAISS's file and of the rows."""
    return f"index-{about.generation}.faiss", f"rows-{about.generation}.parquet"


def write(folder: Path, about: About, vectors: Any, rows: "pa.Table") -> About:
    """Write the next generation of an index, and then its card; the files of the last one are removed.

    Args:
        vectors: FAISS's index, on the CPU.

    Raises:
        CascadeError: the disk is full, or the folder cannot be written.
    """
    about = replace(about, rows=len(rows), generation=about.generation + 1)
    vector_file, row_file = (folder / name for name in names(about))
    try:
        with atomic.file(vector_file, alone=True) as beside:
            faiss().write_index(vectors, str(beside))
        with writing(row_file, rows.schema) as append:
            append(rows)
        about = replace(about, sums={path.name: _sum(path) for path in (vector_file, row_file)})
        with atomic.file(folder / CARD, alone=True) as beside:
            beside.write_text(json.dumps(asdict(about), indent=1) + "\n")
    except (OSError, RuntimeError) as error:  # FAISS raises the latter if it cannot write
        raise CascadeError(f"{folder} could not be written ({error}): free disk space, or name another") from error
    _sweep(folder, about)
    return about


@contextmanager
def changing(folder: Path) -> Iterator[About]:
    """Lock an index for an update until the block ends, remove what a killed one left, and yield the card.

    Raises:
        CascadeError: the folder holds no index, or another process updates it.
    """
    about = read_card(folder)
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CascadeError(f"{folder} is being changed by another process: wait for it") from None
        about = read_card(folder)
        _sweep(folder, about)
        yield about
    finally:
        os.close(lock)


def _read(folder: Path, about: About, device: str) -> Index:
    """Read the files that a card names. Raises FileNotFoundError if one is missing, CascadeError if one is damaged."""
    import pyarrow.parquet as pq

    vector_file, row_file = (folder / name for name in names(about))
    for path in (vector_file, row_file):
        if _sum(path) != (about.sums or {})[path.name]:
            raise CascadeError(f"{path} is damaged: build the index again")
    try:
        rows, vectors = pq.read_table(row_file), faiss().read_index(str(vector_file))
    except (ValueError, RuntimeError) as error:  # FAISS raises the latter, also where there is no file any more
        if not vector_file.exists():
            raise FileNotFoundError(ENOENT, "replaced", str(vector_file)) from None
        raise CascadeError(f"{folder} is no index ({error}): make one with cascade index build") from error
    dead = vectors.ntotal - len(rows)
    if len(rows) != about.rows or vectors.d != about.dim or dead < 0 or (dead and about.kind != "hnsw"):
        raise CascadeError(f"{folder} does not fit together: build the index again")
    kinds.make_readable(vectors, about.kind)
    return Index(about, kinds.on_device(vectors, about.kind, device), rows)


def _sweep(folder: Path, about: About) -> None:
    """Remove everything that an earlier update, or one that was killed, left."""
    shutil.rmtree(folder / ADDING, ignore_errors=True)
    kept = {folder / name for name in names(about)}
    for pattern in ("index-*.faiss", "rows-*.parquet", ".*.tmp"):
        for path in set(folder.glob(pattern)) - kept:
            path.unlink(missing_ok=True)


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
