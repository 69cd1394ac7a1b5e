"""Pack a bundle into one file: a zstd-compressed tar of its files (``tar --zstd -xf`` opens it, too)."""

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

import zstandard

from cascade.atomic import write_bytes
from cascade.bundle.bundle import BundleError
from cascade.bundle.files import FILE_NAME, MAX_BYTES, SUMS, listed
from cascade.bundle.format import read, write_files
from cascade.errors import CascadeError

LEVEL = 19
ALWAYS, RATIO = 64 * 2**20, 20
"""An archive may expand to ``ALWAYS`` bytes or ``RATIO`` times its own size, because bundles are mostly compressed."""


def pack(folder: Path, file: Path) -> Path:
    """Write the bundle in ``folder`` to one file, atomically. The same bundle gives the same bytes.

    Raises:
        BundleError: the bundle is invalid, or the file exists or can't be written.
    """
    read(folder)
    if file.exists():
        raise BundleError(f"{file} exists: choose another name")
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name in sorted((*listed(folder), SUMS)):
            raw = (folder / name).read_bytes()
            member = tarfile.TarInfo(name)  # without date or owner, so that the bytes are reproducible
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
    compressor = zstandard.ZstdCompressor(LEVEL, write_checksum=True, write_content_size=True)
    try:
        write_bytes(file, [compressor.compress(tar.getbuffer())])
    except CascadeError as error:
        raise BundleError(f"can't write the packed bundle: {error}") from error
    return file


def unpack(file: Path, folder: Path) -> Path:
    """Verify the bundle in ``file`` and write it atomically to ``folder`` (``<name>/<version>``), which must not exist.

    The files may expand to ``ALWAYS`` bytes or ``RATIO`` times the archive's size. ``check_claims`` limits the masks,
    also relative to the archive's size.

    Raises:
        BundleError: the file was not written by ``pack``, or is damaged, or the folder can't be written.
    """
    try:
        if file.stat().st_size > MAX_BYTES:
            raise BundleError(f"{file} is larger than {MAX_BYTES} bytes, too large for a packed bundle")
        raw = file.read_bytes()
    except OSError as error:
        raise BundleError(f"can't read {file}: {error.strerror or error}") from None
    return unpack_bytes(raw, folder, str(file))


def unpack_bytes(raw: bytes, folder: Path, source: str) -> Path:
    """``unpack`` from memory; errors call the archive ``source``. Raises BundleError."""
    try:
        files = _members(_expanded(raw))
    except (zstandard.ZstdError, tarfile.TarError, ValueError, OSError) as error:
        raise BundleError(f"{source} is not a packed bundle, or is damaged ({error}): download it again") from None
    return write_files(folder, files, packed=len(raw))  # limit masks by the archive's size, not its expanded size


def _expanded(raw: bytes) -> bytes:
    size = zstandard.frame_content_size(raw)
    if not 0 <= size <= max(ALWAYS, RATIO * len(raw)):  # checked before anything is expanded
        raise ValueError(f"{len(raw)} bytes claim to expand to {size}")
    return zstandard.ZstdDecompressor().decompress(raw, allow_extra_data=False)


def _members(tar: bytes) -> Mapping[str, bytes]:
    """The plain files of a tar archive by name."""
    files: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(tar), mode="r:") as archive:
        for member in archive:
            content = archive.extractfile(member) if member.type == tarfile.REGTYPE and not member.issparse() else None
            if content is None or not FILE_NAME.fullmatch(member.name) or not 0 <= member.size <= len(tar):
                raise ValueError(f"{member.name[:40]!r} is not a file of a bundle")
            files[member.name] = content.read()
    return files
