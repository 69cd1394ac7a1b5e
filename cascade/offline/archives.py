"""Images in tar shards (webdataset's layout) and in Parquet files: cut into pieces of work, and read piece by piece.

Nothing is extracted. Whatever is wrong with an archive once its pieces are known becomes images that can't be loaded.
"""

import tarfile
from collections.abc import Iterator
from functools import partial
from typing import IO, TYPE_CHECKING

from cascade.errors import CascadeError, brief
from cascade.model.preprocessing import LIMITS, ImageError, Limits, too_large
from cascade.offline.files import SUFFIXES, Held, Load, is_url, open_file, suffix

if TYPE_CHECKING:
    import pyarrow as pa

GROUP = 2 * 2**30  # bytes of a Parquet row group's images


# Tar


def cut_tar(where: str, rows: int) -> Iterator[tuple[int, int | None]]:
    """Pieces of a tar: the byte at which the first member begins, and how many images.

    One of this machine is cut by its headers, which takes a moment; one elsewhere stays whole, and how many images it
    has nobody knows (None).

    Raises:
        CascadeError: it can't be read, or is no tar.
    """
    if is_url(where):
        yield 0, None
        return
    start = count = 0
    try:
        with open(where, "rb") as file:
            for member in _members(_Within(file, LIMITS.max_bytes)):
                if count == rows:
                    yield start, count
                    start, count = member.offset, 0
                count += 1
    except OSError as error:
        raise CascadeError(f"{where} can't be read ({error.strerror}): check the path") from error
    except tarfile.TarError as error:
        if not start and not count:
            raise CascadeError(f"{where} is no tar file ({error}): write it again, or leave it away") from error
        count += 1  # the row that says so
    if count:
        yield start, count


def read_tar(where: str, start: int, count: int | None, limits: Limits) -> Iterator[tuple[str, Load]]:
    """``count`` images from byte ``start`` on, or all; what a damaged end holds is one image that can't be loaded."""
    given = 0
    try:
        with open_file(where) as opened:
            if start:
                opened.seek(start)
            file = _Within(opened, LIMITS.max_bytes)
            for member in _members(file):
                key = f"{where}#{member.name}"
                given += 1
                if not member.isreg() or member.issparse():
                    yield key, partial(_fail, f"{key} is a link or no regular file: pack the image itself")
                elif not is_url(where) or member.size > limits.max_bytes:
                    yield key, partial(_slice, where, member.offset_data, member.size, limits)
                else:
                    file.seek(member.offset_data)
                    yield key, Held(file.read(member.size))
                if given == count:
                    return
    except Exception as error:  # whatever a store's client raises, too
        why = f"{where} is damaged or can't be read after {given} images ({brief(error)}): write it again"
        yield f"{where}#", partial(_fail, why)


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
            if suffix(member.name) in SUFFIXES and not member.isdir():
                yield member
        file.seek(tar.offset)  # tarfile takes a header that it can't read for the end
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError("a header is damaged")


def _slice(where: str, start: int, size: int, limits: Limits) -> bytes:
    """A member of a tar of this machine, or why not; one that is too large is not read wherever it is."""
    if size > limits.max_bytes:
        raise too_large(size, limits)
    try:
        with open(where, "rb") as file:
            file.seek(start)
            return file.read(size)
    except OSError as error:
        raise ImageError("unreadable", f"{where} cannot be read ({error.strerror}): check the path") from error


# Parquet


def cut_parquet(where: str, rows: int) -> Iterator[tuple[int, int, int, int]]:
    """Pieces of a Parquet file, as many row groups together as have ``rows`` rows.

    Yields:
        The first row group, the one after the last, the number of the first row, and how many rows.

    Raises:
        CascadeError: it can't be read, has no column of images or more than one, or a row group is too large.
    """
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
            yield start, group + 1, row, count
            start, row, count = group + 1, row + count, 0


def read_parquet(where: str, start: int, stop: int, row: int, count: int) -> Iterator[tuple[str, Load]]:
    """The images of a piece, as ``cut_parquet`` gave it."""
    import pyarrow.parquet as pq

    end = row + count
    try:
        with open_file(where) as file, pq.ParquetFile(file, pre_buffer=False, buffer_size=2**20) as parquet:
            name = _column(parquet.schema_arrow, where)
            groups = list(range(start, stop))
            for batch in parquet.iter_batches(32, row_groups=groups, columns=[name], use_threads=False):
                column = batch.column(0)
                for value in column.field("bytes") if name.endswith(".bytes") else column:
                    key, data = f"{where}#{row}", value.as_py()
                    row += 1
                    yield key, Held(data or b"")
    except Exception as error:
        why = f"{where} cannot be read ({brief(error)}): write it again"
        for lost in range(row, end):  # a row each, for each has a place in the output
            yield f"{where}#{lost}", partial(_fail, why)


def read_rows(where: str, rows: set[int]) -> Iterator[tuple[str, Load]]:
    """The images of the row groups that hold some of the rows."""
    import pyarrow.parquet as pq

    about, first = pq.read_metadata(where), 0
    for group in range(about.num_row_groups):
        count = about.row_group(group).num_rows
        if any(first <= row < first + count for row in rows):
            yield from read_parquet(where, group, group + 1, first, count)
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
    raise ImageError("unreadable", why)
