"""Sources of an offline job: expand them, split them into units of work, and read the images of a unit.

A source is an image, a folder, a pattern, a tar shard, a Parquet file of images, a text file that lists names, or a URL
of one of these. One worker processes a unit from beginning to end, and it becomes one file of the output.
"""

import codecs
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from cascade.errors import CascadeError, brief
from cascade.model.decoding import LIMITS, Limits, load
from cascade.offline.files import SUFFIXES, Load, fetch, find, is_pattern, is_url, open_file, suffix
from cascade.offline.parquet_files import cut_parquet, read_parquet, read_rows
from cascade.offline.tar_files import cut_tar, read_tar

ROWS = 4096  # images of a unit, if the source can be split
LINE = 8192  # bytes of a line in a list
PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")
KNOWN = {*SUFFIXES, ".tar", ".parquet", *(suffix(f"x{packed}") for packed in PACKED)}


@dataclass(frozen=True)
class Unit:
    """A piece of a job.

    Attributes:
        kind: how ``read`` reads it.
        count: number of images, each of which becomes a row; None if unknown before reading (a remote tar).
        names: files: paths and URLs.
        where: tar, parquet: the file.
        start: tar: byte offset of the first member; parquet: the first row group.
        stop: parquet: the row group after the last.
        row: parquet: number of the first row.
    """

    kind: Literal["files", "tar", "parquet"]
    count: int | None
    names: tuple[str, ...] = ()
    where: str = ""
    start: int = 0
    stop: int = 0
    row: int = 0

    def to_json(self) -> str:
        """One line of JSON. Names that are not UTF-8 survive: their bytes are escaped."""
        return json.dumps({k: v for k, v in asdict(self).items() if v or k == "count"}, separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str) -> "Unit":
        """The inverse of ``to_json``."""
        values = json.loads(line)
        return cls(**values | {"names": tuple(values.get("names", ()))})


def plan(sources: Iterable[str | Path], rows: int = ROWS) -> Iterator[Unit]:
    """The units of ``sources`` in order, sorted within each source. No image is read.

    Args:
        sources: see ``expand``.
        rows: images of a unit. A Parquet row group and a remote tar are not split.

    Raises:
        CascadeError: a source has no images, or is not what its name says.
    """
    names: list[str] = []
    nothing = True

    def files() -> Iterator[Unit]:
        if names:
            yield Unit("files", len(names), tuple(names))
            names.clear()

    for source in map(str, sources):
        empty = True
        for name in expand(source):
            empty = False
            if suffix(name) in (".tar", ".parquet"):
                yield from files()
                for unit in _cut(name, rows):
                    nothing = False
                    yield unit
                continue
            nothing = False
            names.append(name)
            if len(names) == rows:
                yield from files()
        if empty:
            raise CascadeError(f"{source} has no images: name image files, or a folder or pattern that has some")
    yield from files()
    if nothing:
        raise CascadeError("no images were named: give files, folders or patterns such as 'photos/**/*.jpg'")


def read(unit: Unit, limits: Limits = LIMITS) -> Iterator[tuple[str, Load]]:
    """The images of a unit in order: key, and a Load of its bytes. They are the same in every run.

    Keys are the path or URL of a file, ``SHARD.tar#MEMBER`` or ``FILE.parquet#ROW``. The rest of a damaged tar is one
    image that cannot be loaded. Use the iterator in one thread, the Loads in any.
    """
    match unit.kind:
        case "files":
            for name in unit.names:
                yield name, partial(fetch, name, limits) if is_url(name) else partial(load, Path(name), limits)
        case "tar":
            yield from read_tar(unit.where, unit.start, unit.count, limits)
        case "parquet":
            yield from read_parquet(unit.where, unit.start, unit.stop, unit.row, unit.count or 0)


def again(keys: Iterable[str]) -> Iterator[tuple[str, Load]]:
    """Find a few images again by the keys that ``read`` gave, each once, in any order.

    Images in remote archives, which would have to be read from the beginning, and missing ones are left out.
    """
    inside: dict[str, set[str]] = {}
    for key in dict.fromkeys(keys):
        where, name = _parted(key)
        if name is None:
            yield from read(Unit("files", 1, (key,)))
        elif os.path.isfile(where):
            inside.setdefault(where, set()).add(name)
    for where, names in inside.items():
        if suffix(where) == ".tar":
            images = read_tar(where, 0, None, LIMITS)
        else:
            images = read_rows(where, {int(name) for name in names if name.isdecimal()})
        for key, image in images:
            if (name := _parted(key)[1]) in names:
                names.discard(name)
                yield key, image
            if not names:
                break


def expand(source: str) -> Iterator[str]:
    """The files that a source stands for: images, tar shards, Parquet files.

    An image stands for itself, even if it is missing. A folder stands for the images in it, see ``files.images_in``. A
    pattern (``*``, ``?``, ``[]``, ``**``) stands for what it matches. A text file (.txt) lists names, one a
    line: files, folders and URLs, but no patterns. In a URL, a folder ends in ``/`` and a pattern has a ``*``.

    Raises:
        CascadeError: a list or a URL cannot be read, an archive is compressed, or a name exists nowhere and is not an
            image's, such as a mistyped folder.
    """
    listed = source.endswith(".txt")
    if not (listed or is_url(source) or is_pattern(source) or os.path.lexists(source) or suffix(source) in KNOWN):
        raise CascadeError(f"{source} does not exist: name images, folders, patterns, .tar or .parquet files, or URLs")
    for line in _lines(source) if listed else [source]:
        for name in find(line, patterns=not listed):
            if name.lower().endswith(PACKED):
                raise CascadeError(
                    f"{name} is compressed, which saves nothing on images: unpack it to a .tar, name that"
                )
            yield name


def _cut(name: str, rows: int) -> Iterator[Unit]:
    """The units of an archive."""
    if suffix(name) == ".tar":
        for start, count in cut_tar(name, rows):
            yield Unit("tar", count, where=name, start=start)
    else:
        for start, stop, row, number in cut_parquet(name, rows):
            yield Unit("parquet", number, where=name, start=start, stop=stop, row=row)


def _lines(where: str) -> Iterator[str]:
    """The names in a list, without blank lines and comments. Read block by block: a list may be long.

    Raises:
        CascadeError: the list cannot be read, is UTF-16, or has a line of more than LINE bytes.
    """
    try:
        number, rest = 0, b""
        with open_file(where, whole=True) as file:
            while block := file.read(LINE):
                if not number and not rest:
                    if block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                        raise CascadeError(f"{where} is UTF-16: save it as UTF-8")
                    block = block.removeprefix(codecs.BOM_UTF8)
                *complete, rest = (rest + block).split(b"\n")
                for raw in complete if len(rest) <= LINE else [*complete, rest]:
                    number += 1
                    yield from _name_of(where, number, raw)
        yield from _name_of(where, number + 1, rest)
    except CascadeError:
        raise
    except Exception as error:  # each client has its own exceptions
        message = f"{where} cannot be read ({brief(error)}): name a text file with one source a line"
        raise CascadeError(message) from error


def _name_of(where: str, number: int, raw: bytes) -> Iterator[str]:
    if len(raw) > LINE:
        raise CascadeError(f"{where}, line {number}: longer than {LINE} bytes; write one source a line")
    line = os.fsdecode(raw).strip()
    if line and not line.startswith("#"):
        yield line


def _parted(key: str) -> tuple[str, str | None]:
    """The archive that a key points into, and the name or row there; None for a plain file."""
    for mark in (".tar#", ".parquet#"):
        at = key.lower().find(mark)
        if at >= 0:
            end = at + len(mark)
            return key[: end - 1], key[end:]
    return key, None
