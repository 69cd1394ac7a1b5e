"""Sources of an offline job: what they stand for, cut into units of work, and the images of a unit, one at a time.

A source is an image, a folder, a pattern, a tar shard, a Parquet file that holds images, a text file of further
sources, or a URL of one of these. A unit is what one worker does from its first image to its last, and becomes one
file of the output.
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from cascade.errors import CascadeError, brief
from cascade.model.preprocessing import LIMITS, Limits, load
from cascade.offline.archives import cut_parquet, cut_tar, read_parquet, read_rows, read_tar
from cascade.offline.files import SUFFIXES, Load, fetch, find, is_pattern, is_url, open_file, suffix

ROWS = 4096  # images of a unit, where a source can be cut
LINE = 8192  # bytes of a line in a list
PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")
KNOWN = {*SUFFIXES, ".tar", ".parquet", *(suffix(f"x{packed}") for packed in PACKED)}


@dataclass(frozen=True)
class Unit:
    """A piece of the work.

    Attributes:
        kind: what ``read`` does with it.
        count: images, each of which becomes a row; None where that shows only when it is read (a tar elsewhere).
        names: files: paths and URLs.
        where: tar, parquet: the file.
        start: tar: byte at which the first member begins; parquet: the first row group.
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
        """One line. Names that are not UTF-8 survive: their bytes are escaped."""
        return json.dumps({k: v for k, v in asdict(self).items() if v or k == "count"}, separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str) -> "Unit":
        """The inverse of ``to_json``."""
        found = json.loads(line)
        return cls(**found | {"names": tuple(found.get("names", ()))})


def plan(sources: Iterable[str | Path], rows: int = ROWS) -> Iterator[Unit]:
    """The units of ``sources``, in their order, sorted within each; no image is read for that.

    Args:
        sources: see ``expand``.
        rows: images of a unit. A Parquet row group and a tar elsewhere are not cut.

    Raises:
        CascadeError: one of them has no images, or is not what its name says.
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
    """The images of a unit in its order, each as its key and what loads its bytes; both are the same in every run.

    Keys are the path or URL of a file, ``SHARD.tar#MEMBER``, ``FILE.parquet#ROW``. Where an archive is damaged the
    rest of it is one image that can't be loaded. The iterator is for one thread, what it gives for any.
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
    """The images behind keys that ``read`` gave, in any order, each once, for a look at a few of them.

    Archives elsewhere would have to be read from the beginning: what lies in one is left out, and so is what is gone.
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
    """The files that a source means, as they come: images, tar shards, Parquet files.

    An image stands for itself, there or not. A folder stands for the images in it, by suffix, to any depth, links
    followed but no folder twice; one that cannot be listed stands for itself. A pattern (``*``, ``?``, ``[]``,
    ``**``) stands for what it matches, a text file (.txt) for the sources that it has, one a line. At a URL
    a folder ends in ``/`` and a pattern has a ``*``.

    Raises:
        CascadeError: a list or a URL can't be read, an archive is compressed, or nothing is there by a name that is
            no image's: a folder's, most likely, in which there is a slip.
    """
    listed = source.endswith(".txt")
    if not (listed or is_url(source) or is_pattern(source) or os.path.lexists(source) or suffix(source) in KNOWN):
        raise CascadeError(f"{source} is not there: name images, folders, patterns, .tar or .parquet files, or URLs")
    for line in _lines(source) if listed else [source]:
        for name in find(line):
            if name.lower().endswith(PACKED):
                raise CascadeError(
                    f"{name} is compressed: images gain nothing by it; unpack it to a .tar and name that"
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
    """The lines of a list that say something. Read as it goes: a list may be long."""
    try:
        number, rest = 0, b""
        with open_file(where, whole=True) as file:
            while part := file.read(LINE):
                *whole, rest = (rest + part).split(b"\n")
                for raw in whole if len(rest) <= LINE else [*whole, rest]:
                    number += 1
                    yield from _line_of(where, number, raw)
        yield from _line_of(where, number + 1, rest)
    except CascadeError:
        raise
    except Exception as error:  # of a URL each client has classes of its own
        message = f"{where} can't be read ({brief(error)}): name a text file with one source a line"
        raise CascadeError(message) from error


def _line_of(where: str, number: int, raw: bytes) -> Iterator[str]:
    if len(raw) > LINE:
        raise CascadeError(f"{where}, line {number}: longer than {LINE} bytes; write one source a line")
    line = os.fsdecode(raw).strip()
    if line and not line.startswith("#"):
        yield line


def _parted(key: str) -> tuple[str, str | None]:
    """The archive that a key points into and what is meant there; None for a file by itself."""
    for mark in (".tar#", ".parquet#"):
        at = key.lower().find(mark)
        if at >= 0:
            end = at + len(mark)
            return key[: end - 1], key[end:]
    return key, None
