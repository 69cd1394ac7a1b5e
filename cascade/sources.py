"""Sources of an offline job: what they stand for, cut into units of work, and the images of a unit, one at a time.

A source is an image, a folder, a pattern, a tar shard (webdataset's layout), a Parquet file that holds images, a text
file of further sources, or a URL of one of these that fsspec knows. A unit is what one worker does from its first
image to its last, and becomes one file of the output. Nothing is extracted; what is read at a time is bounded.
"""

import glob
import json
import os
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from cascade.errors import CascadeError, brief
from cascade.images import LIMITS, ImageError, Limits, load, too_large

if TYPE_CHECKING:
    import pyarrow as pa

Load = Callable[[], bytes]
"""Gives the bytes of one image file, in any thread; raises ImageError where they can't be had."""

ROWS = 4096  # images of a unit, where a source can be cut
LINE = 8192  # bytes of a line in a list
GROUP = 2 * 2**30  # bytes of a Parquet row group's images
CONNECT, SILENCE, WHOLE = 10, 30, 120  # seconds: for a connection, between two bytes, for one image
TRIES, PAUSE = 3, 0.5  # of one image that is elsewhere; seconds before the second try, then twice as many

# What a folder is searched for. Those in the second line cannot be decoded and become rows with an error,
# lest a folder of GIFs pass for an empty one.
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp"}
    | {".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jp2", ".jxl"}
)
PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")


@dataclass(frozen=True)
class Held:
    """A Load of what is in memory already."""

    data: bytes

    def __call__(self) -> bytes:
        return self.data


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
            if (kind := _suffix(name)) in (".tar", ".parquet"):
                yield from files()
                for unit in (_tar if kind == ".tar" else _parquet)(name, rows):
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
            yield from _from_tar(unit, limits)
        case "parquet":
            yield from _from_parquet(unit)


def again(keys: Iterable[str], limits: Limits = LIMITS) -> Iterator[tuple[str, Load]]:
    """The images behind keys that ``read`` gave, in any order, each once, for a look at a few of them.

    Archives elsewhere would have to be read from the beginning: what lies in one is left out, and so is what is gone.
    """
    inside: dict[str, set[str]] = {}
    for key in dict.fromkeys(keys):
        where, mark, name = _parted(key)
        if not mark:
            yield from read(Unit("files", 1, (key,)), limits)
        elif os.path.isfile(where):
            inside.setdefault(where, set()).add(name)
    for where, names in inside.items():
        if _suffix(where) == ".tar":
            found: Iterable[tuple[str, Load]] = _from_tar(Unit("tar", None, where=where), limits)
        else:
            found = _rows_again(where, {int(name) for name in names if name.isdecimal()})
        for image in found:
            if (name := _parted(image[0])[2]) in names:
                names.discard(name)
                yield image
            if not names:
                break


def expand(source: str) -> Iterator[str]:
    """The files that a source means, as they come: images, tar shards, Parquet files.

    A file stands for itself, there or not. A folder stands for the images in it, by suffix, to any depth, links
    followed but no folder twice; one that cannot be listed stands for itself. A pattern (``*``, ``?``, ``[]``,
    ``**``) stands for what it matches, a text file (.txt) for the sources that it has, one a line. At a URL
    a folder ends in ``/`` and a pattern has a ``*``.

    Raises:
        CascadeError: a list or a URL can't be read, an archive is compressed.
    """
    if source.endswith(".txt"):
        for line in _lines(source):
            yield from _expand(line)
    else:
        yield from _expand(source)


def fetch(url: str, limits: Limits = LIMITS) -> bytes:
    """The file at a URL, at most one byte more than an image may have.

    Raises:
        ImageError: "unreadable", after three tries where another one may help.
    """
    end = time.monotonic() + WHOLE
    for attempt in range(TRIES):
        try:
            with open_file(url, whole=True) as file:
                parts, left = [], limits.max_bytes + 1
                while left > 0 and (part := file.read(min(left, 2**20))):
                    parts.append(part)
                    left -= len(part)
                    if time.monotonic() > end:
                        raise TimeoutError(f"more than {WHOLE} s")
                return b"".join(parts)
        except (FileNotFoundError, PermissionError, ValueError, ImportError) as error:
            why: Exception = error
            break
        except Exception as error:  # each client has classes of its own
            why = error
            if time.monotonic() > end:
                break
            if attempt < TRIES - 1:
                time.sleep(PAUSE * 2**attempt)
    raise ImageError(400, "unreadable", f"{url} cannot be read ({brief(why)}): check the URL") from why


def open_file(where: str, whole: bool = False) -> AbstractContextManager[IO[bytes]]:
    """A file of this machine or at a URL, for reading.

    Args:
        whole: it will be read once from beginning to end: one request where HTTP would take two.
    """
    if not is_url(where):
        return open(where, "rb")
    fs, path = _filesystem(where)
    stream = whole and _scheme(where) in ("http", "https")
    kwargs = {"block_size": 0, "size": 1} if stream else {}  # a size, whatever it is, saves asking for it
    opened: AbstractContextManager[IO[bytes]] = fs.open(path, "rb", **kwargs)
    return opened


def is_url(name: str) -> bool:
    """Whether a source is a URL and no path of this machine."""
    return "://" in name


def _expand(source: str) -> Iterator[str]:
    if is_url(source):
        yield from _remote(source)
    elif os.path.isdir(source):
        yield from _images_in(source, set())
    elif any(c in source for c in "*?[") and not os.path.lexists(source):
        for match in sorted(set(glob.iglob(source, recursive=True)), key=Path):
            if os.path.lexists(match):  # "gone/**" matches "gone/" in some Pythons
                yield from _images_in(match, set()) if os.path.isdir(match) else [_plain(match)]
    else:
        yield _plain(source)


def _plain(name: str) -> str:
    if name.lower().endswith(PACKED):
        raise CascadeError(f"{name} is compressed: images gain nothing by it; unpack it to a .tar and name that")
    return name


def _images_in(folder: str, seen: set[str]) -> Iterator[str]:
    """Files and folders by name, so that paths come sorted; a link to a folder counts where it is met first."""
    if (real := os.path.realpath(folder)) in seen:
        return
    seen.add(real)
    try:
        with os.scandir(folder) as listed:
            entries = sorted((e.name, _is_folder(e)) for e in listed)
    except OSError:
        yield folder
        return
    for name, is_folder in entries:
        path = os.path.join(folder, name)
        if is_folder:
            yield from _images_in(path, seen)
        elif _suffix(name) in SUFFIXES:
            yield path


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


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


def _remote(url: str) -> Iterator[str]:
    if urlsplit(url).password:
        raise CascadeError("a source's URL holds a password: give it by the environment or fsspec's configuration")
    folder, pattern = url.endswith("/"), "*" in url
    if not (folder or pattern):
        yield _plain(url)
        return
    try:
        fs, path = _filesystem(url)
        found = sorted(map(str, fs.glob(path) if pattern else fs.find(path)))
    except Exception as error:
        raise CascadeError(f"{url} can't be listed ({brief(error)}): is it in reach?") from error
    for name in found:
        if pattern or _suffix(name) in SUFFIXES:
            yield _plain(str(fs.unstrip_protocol(name)))


def _filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system and the path in it, with times after which a silent server is given up."""
    import fsspec

    options: dict[str, Any] = {}
    match _scheme(url):
        case "http" | "https":
            from fsspec.implementations.http import aiohttp  # what fsspec itself takes these times as

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT, sock_read=SILENCE)
            options["client_kwargs"] = {"timeout": timeout}
        case "s3":
            options["config_kwargs"] = {"connect_timeout": CONNECT, "read_timeout": SILENCE}
        case "gs" | "gcs":
            options["timeout"] = SILENCE
    found: tuple[Any, str] = fsspec.core.url_to_fs(url, **options)
    return found


# Tar


class _Within:
    """A file as tarfile wants it: seeks forward where its own can't, and no header makes it read without end."""

    def __init__(self, file: IO[bytes], most: int) -> None:
        self.file, self.most, self.position = file, most, file.tell()

    def tell(self) -> int:
        return self.position

    def seek(self, position: int) -> int:
        if position == self.position:
            return position
        try:
            self.position = self.file.seek(position)
        except (ValueError, OSError):  # HTTP without ranges
            while self.position < position and self.read(min(position - self.position, 2**20)):
                pass
        return self.position

    def read(self, size: int) -> bytes:
        if size > self.most:
            raise tarfile.ReadError(f"a header of {size} bytes")
        parts = []
        while size > 0 and (part := self.file.read(size)):
            parts.append(part)
            size -= len(part)
            self.position += len(part)
        return b"".join(parts)


def _members(file: _Within) -> Iterator[tarfile.TarInfo]:
    """The images of a tar from where ``file`` stands. Raises tarfile.TarError where it is damaged."""
    with tarfile.open(fileobj=file, mode="r:") as tar:  # type: ignore[call-overload]
        while (member := tar.next()) is not None:
            tar.members.clear()  # or they would all be kept
            if _suffix(member.name) in SUFFIXES and not member.isdir():
                yield member
        file.seek(tar.offset)  # tarfile takes a header that it can't read for the end
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError("a header is damaged")


def _tar(where: str, rows: int) -> Iterator[Unit]:
    """Units of a tar: of this machine cut by its headers, which takes a moment; elsewhere whole."""
    if is_url(where):
        yield Unit("tar", None, where=where)
        return
    start = count = 0
    try:
        with open(where, "rb") as file:
            for member in _members(_Within(file, LIMITS.max_bytes)):
                if count == rows:
                    yield Unit("tar", count, where=where, start=start)
                    start, count = member.offset, 0
                count += 1
    except OSError as error:
        raise CascadeError(f"{where} can't be read ({error.strerror}): check the path") from error
    except tarfile.TarError as error:
        if not start and not count:
            raise CascadeError(f"{where} is no tar file ({error}): write it again, or leave it away") from error
        count += 1  # the row that says so
    if count:
        yield Unit("tar", count, where=where, start=start)


def _from_tar(unit: Unit, limits: Limits) -> Iterator[tuple[str, Load]]:
    here = not is_url(unit.where)
    given = 0
    try:
        with open_file(unit.where) as opened:
            if unit.start:
                opened.seek(unit.start)
            file = _Within(opened, LIMITS.max_bytes)
            for member in _members(file):
                key = f"{unit.where}#{member.name}"
                given += 1
                if not member.isreg() or member.issparse():
                    yield key, partial(_fail, f"{key} is a link or no regular file: pack the image itself")
                elif here or member.size > limits.max_bytes:
                    yield key, partial(_slice, unit.where, member.offset_data, member.size, limits)
                else:
                    file.seek(member.offset_data)
                    yield key, Held(file.read(member.size))
                if given == unit.count:
                    return
    except Exception as error:  # whatever a store's client raises, too
        why = f"{unit.where} is damaged or can't be read after {given} images ({brief(error)}): write it again"
        yield f"{unit.where}#", partial(_fail, why)


def _slice(where: str, start: int, size: int, limits: Limits) -> bytes:
    """A member of a tar of this machine, or why not; one that is too large is not read wherever it is."""
    if size > limits.max_bytes:
        raise too_large(size, limits)
    try:
        with open(where, "rb") as file:
            file.seek(start)
            return file.read(size)
    except OSError as error:
        raise ImageError(400, "unreadable", f"{where} cannot be read ({error.strerror}): check the path") from error


# Parquet


def _parquet(where: str, rows: int) -> Iterator[Unit]:
    """Units of a Parquet file: row groups, as many together as have ``rows`` rows."""
    import pyarrow.parquet as pq

    try:
        with open_file(where) as file, pq.ParquetFile(file) as parquet:
            name = _column(parquet.schema_arrow, where)
            about = parquet.metadata
    except CascadeError:
        raise
    except Exception as error:
        message = f"{where} can't be read as Parquet ({brief(error)}): write it again, or leave it away"
        raise CascadeError(message) from error
    start = row = count = 0
    for group in range(about.num_row_groups):
        found = about.row_group(group)
        parts = (found.column(i) for i in range(found.num_columns))
        size = sum(part.total_uncompressed_size for part in parts if part.path_in_schema == name)
        if size > GROUP:
            raise CascadeError(f"{where}: row group {group} has {size} bytes of images; write it with smaller ones")
        count += found.num_rows
        if count and (count >= rows or group == about.num_row_groups - 1):
            yield Unit("parquet", count, where=where, start=start, stop=group + 1, row=row)
            start, row, count = group + 1, row + count, 0


def _from_parquet(unit: Unit) -> Iterator[tuple[str, Load]]:
    import pyarrow.parquet as pq

    row = unit.row
    try:
        with open_file(unit.where) as file, pq.ParquetFile(file, pre_buffer=False, buffer_size=2**20) as parquet:
            name = _column(parquet.schema_arrow, unit.where)
            groups = list(range(unit.start, unit.stop))
            for batch in parquet.iter_batches(32, row_groups=groups, columns=[name], use_threads=False):
                column = batch.column(0)
                for value in column.field("bytes") if name.endswith(".bytes") else column:
                    key, data = f"{unit.where}#{row}", value.as_py()
                    row += 1
                    yield key, Held(data or b"")
    except Exception as error:
        why = f"{unit.where} cannot be read ({brief(error)}): write it again"
        for lost in range(row, unit.row + (unit.count or 0)):  # a row each, for each has a place in the output
            yield f"{unit.where}#{lost}", partial(_fail, why)


def _rows_again(where: str, rows: set[int]) -> Iterator[tuple[str, Load]]:
    """The row groups that hold some of the rows."""
    import pyarrow.parquet as pq

    about, first = pq.read_metadata(where), 0
    for group in range(about.num_row_groups):
        count = about.row_group(group).num_rows
        if any(first <= row < first + count for row in rows):
            yield from _from_parquet(Unit("parquet", count, where=where, start=group, stop=group + 1, row=first))
        first += count


def _column(schema: "pa.Schema", where: str) -> str:
    """The column of images: called image, img, bytes or so, or the only one there is; of a struct, its bytes."""
    import pyarrow as pa

    def binary(kind: "pa.DataType") -> bool:
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    def path(field: "pa.Field") -> str | None:
        if binary(field.type):
            return str(field.name)
        at = field.type.get_field_index("bytes") if pa.types.is_struct(field.type) else -1
        return f"{field.name}.bytes" if at >= 0 and binary(field.type.field(at).type) else None

    found = {field.name: name for field in schema if (name := path(field))}
    for name in ("image", "img", "bytes", "jpg", "jpeg", "png", "webp"):
        if name in found:
            return found[name]
    if len(found) == 1:
        return next(iter(found.values()))
    raise CascadeError(f"{where} has {len(found)} columns of bytes: call the one with the images 'image'")


def _fail(why: str) -> bytes:
    raise ImageError(400, "unreadable", why)


def _parted(key: str) -> tuple[str, str, str]:
    """The archive that a key points into, "#" and what is meant there; "" and "" for a file by itself."""
    for mark in (".tar#", ".parquet#"):
        at = key.lower().find(mark)
        if at >= 0:
            end = at + len(mark)
            return key[: end - 1], "#", key[end:]
    return key, "", ""


def _suffix(name: str) -> str:
    return os.path.splitext(urlsplit(name).path if is_url(name) else name)[1].lower()


def _scheme(url: str) -> str:
    return url.partition("://")[0].rpartition("::")[2]
