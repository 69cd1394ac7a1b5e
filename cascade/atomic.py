"""Atomic file and folder writes: write to a temporary name, sync, rename. A failed write leaves nothing behind.

``file`` and ``folder`` raise OSError, which the caller describes. ``write_text`` and ``write_bytes`` raise a
CascadeError that names the path.

A device or a named pipe is written directly, so that ``--report /dev/null`` does not replace the device. A symbolic
link stays, and the file that it points to is replaced.
"""

import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

from cascade.errors import CascadeError

ABANDONED = 3600.0
"""Seconds without a write after which a temporary folder belongs to a process that was killed."""


@contextmanager
def file(path: Path, *, alone: bool = False) -> Iterator[Path]:
    """Yield a temporary name next to ``path``; the file written there replaces ``path`` if the block succeeds.

    Args:
        path: the file to write.
        alone: no other process writes this file. The temporary name is then fixed, so that a leftover of a killed
            process is overwritten.
    """
    if is_special(path):
        yield path
        return
    path = path.resolve()
    beside = path.with_name(f".{path.name}.tmp") if alone else _beside(path)
    try:
        yield beside
        sync(beside)
        beside.replace(path)
        sync(path.parent)
    except BaseException:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise


def is_special(path: Path) -> bool:
    """Whether ``path`` exists and is neither a regular file nor a folder: a device, a pipe or a socket."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


@contextmanager
def folder(path: Path) -> Iterator[Path]:
    """Yield a new temporary folder, which is synced and renamed to ``path`` if the block succeeds.

    Leftovers of the same folder from a process that was killed at least an hour ago are removed.

    Raises:
        OSError: ``path`` exists and is not empty, or cannot be written.
    """
    beside = _beside(path)
    _sweep(path)
    try:
        beside.mkdir(parents=True)
        yield beside
        for child in beside.iterdir():
            sync(child)
        sync(beside)
        beside.rename(path)
        sync(path.parent)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def write_text(path: Path, lines: Iterable[str]) -> None:
    """Write a text file atomically.

    Raises:
        CascadeError: it cannot be written.
    """
    write_bytes(path, (line.encode() for line in lines))


def write_bytes(path: Path, blocks: Iterable[bytes]) -> None:
    """Write a file atomically.

    Raises:
        CascadeError: it cannot be written.
    """
    try:
        with file(path) as beside, beside.open("wb") as out:
            out.writelines(blocks)
    except OSError as error:
        raise not_written(path, error) from error


def not_written(path: Path, error: OSError) -> CascadeError:
    """The error for a file that cannot be written."""
    return CascadeError(f"{path} could not be written ({error}): free disk space, or choose another path")


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sweep(path: Path) -> None:
    """Remove abandoned temporary folders of ``path`` by age. Process ids are meaningless if containers share a disk."""
    for leftover in path.parent.glob(f".{escape(path.name)}.*-*.tmp"):
        with suppress(OSError):  # another process is removing it
            if time.time() - max(p.stat().st_mtime for p in (leftover, *leftover.rglob("*"))) > ABANDONED:
                shutil.rmtree(leftover, ignore_errors=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
