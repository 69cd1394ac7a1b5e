"""Images in tar shards (webdataset's layout): split into pieces of work by their headers, and read piece by piece.

Nothing is extracted. A tar that turns out to be damaged yields its remaining images as one that cannot be loaded.
"""

import tarfile
from collections.abc import Iterator
from functools import partial
from typing import IO

from cascade.errors import CascadeError, brief
from cascade.model.decoding import LIMITS, ImageError, Limits, too_large
from cascade.offline.files import SUFFIXES, Held, LeftOut, Load, failing, is_leftover, is_url, open_file, suffix


def cut_tar(where: str, rows: int) -> Iterator[tuple[int, int | None]]:
    """Yield pieces of a tar: the byte offset of the first member, and the number of images.

    A local file is split by its headers. A remote one is a single piece with an unknown number of images (None).

    Raises:
        CascadeError: the file cannot be read, or is not a tar.
    """
    if is_url(where):
        yield 0, None
        return
    start = count = 0
    left_out = LeftOut(where)
    try:
        with open(where, "rb") as file:
            for member in _members(_Within(file, LIMITS.max_bytes), left_out):
                if count == rows:
                    yield start, count
                    start, count = member.offset, 0
                count += 1
    except OSError as error:
        raise CascadeError(f"{where} can't be read ({error.strerror}): check the path") from error
    except Exception as error:  # a hostile header makes tarfile raise many types
        if not start and not count:
            raise CascadeError(f"{where} is not a tar file ({error}): write it again, or omit it") from error
        count += 1  # the row with the error
    left_out.log()
    if count:
        yield start, count


def read_tar(where: str, start: int, count: int | None, limits: Limits) -> Iterator[tuple[str, Load]]:
    """Yield ``count`` images from byte ``start`` on, or all; a damaged end becomes one image that cannot be loaded."""
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
                    yield key, failing(f"{key} is a link or not a regular file: pack the image itself")
                elif not is_url(where) or member.size > limits.max_bytes:
                    yield key, partial(_slice, where, member.offset_data, member.size, limits)
                else:
                    file.seek(member.offset_data)
                    yield key, Held(file.read(member.size))
                if given == count:
                    return
    except Exception as error:  # each store's client has exceptions of its own
        why = f"{where} is damaged or cannot be read after {given} images ({brief(error)}): write it again"
        yield f"{where}#", failing(why)


class _Within:
    """A file for tarfile: seeks forward by reading if necessary, and bounds how much one header makes it read."""

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


def _members(file: _Within, left_out: LeftOut | None = None) -> Iterator[tarfile.TarInfo]:
    """The images of a tar from the position of ``file`` on. Raises tarfile.TarError if it is damaged."""
    with tarfile.open(fileobj=file, mode="r:") as tar:  # type: ignore[call-overload]
        while (member := tar.next()) is not None:
            tar.members.clear()  # tarfile would keep them all
            if member.size < 0:  # tarfile would seek back, and read the same header again
                raise tarfile.ReadError(f"a member of {member.size} bytes")
            if suffix(member.name) not in SUFFIXES or member.isdir():
                continue
            if any(map(is_leftover, member.name.split("/"))):
                if left_out is not None:
                    left_out.add(member.name)
                continue
            yield member
        file.seek(tar.offset)  # tarfile takes a damaged header for the end
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError("a header is damaged")


def _slice(where: str, start: int, size: int, limits: Limits) -> bytes:
    """The bytes of a member of a local tar. Raises ImageError; a member that is too large is not read."""
    if size > limits.max_bytes:
        raise too_large(size, limits)
    try:
        with open(where, "rb") as file:
            file.seek(start)
            return file.read(size)
    except OSError as error:
        raise ImageError("unreadable", f"{where} cannot be read ({error.strerror}): check the path") from error
