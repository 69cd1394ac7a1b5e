"""Files and folders that are whole or not there: written beside, synced, renamed; what fails leaves nothing behind.

An OSError is for the caller to put into words, who knows what the file is for; ``write_text`` and ``write_bytes`` have
words for one that a person has named.
"""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cascade.errors import CascadeError


@contextmanager
def file(path: Path, *, alone: bool = False) -> Iterator[Path]:
    """A name beside ``path``; the file that the block writes there takes its place, synced, if the block ends well.

    Args:
        alone: no other process writes the same file meanwhile. The name is always the same one then, and what a
            process that was killed has left there is written over.
    """
    beside = path.with_name(f".{path.name}.tmp") if alone else _beside(path)
    try:
        yield beside
        sync(beside)
        beside.replace(path)
        sync(path.parent)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


@contextmanager
def folder(path: Path) -> Iterator[Path]:
    """A new folder beside ``path``; it becomes ``path``, with its files synced, if the block ends well.

    Raises:
        OSError: ``path`` is there and not empty, or it can't be written.
    """
    beside = _beside(path)
    try:
        beside.mkdir(parents=True)
        yield beside
        for each in beside.iterdir():
            sync(each)
        sync(beside)
        beside.rename(path)
        sync(path.parent)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def write_text(path: Path, lines: Iterable[str]) -> None:
    """A text file that is whole or not there.

    Raises:
        CascadeError: it can't be written.
    """
    write_bytes(path, (line.encode() for line in lines))


def write_bytes(path: Path, blocks: Iterable[bytes]) -> None:
    """A file that is whole or not there.

    Raises:
        CascadeError: it can't be written.
    """
    try:
        with file(path) as beside, beside.open("wb") as out:
            out.writelines(blocks)
    except OSError as error:
        raise not_written(path, error) from error


def not_written(path: Path, error: OSError) -> CascadeError:
    """The error for who has named a file that can't be written."""
    return CascadeError(f"{path} could not be written ({error}): make room, or name another")


def sync(path: Path) -> None:
    """Make what is in a file, or a rename inside a folder, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")
