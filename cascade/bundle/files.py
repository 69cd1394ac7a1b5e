"""The files of a bundle on disk: names, sizes and checksums.

Bundles are untrusted input. Sizes are checked before anything is read, and hidden files, which operating systems leave
everywhere (``.DS_Store``, ``._x``, ``.nfs...``, the links of a Kubernetes ConfigMap), are ignored.
"""

import hashlib
import os
import re
import unicodedata
from collections.abc import Collection, Mapping
from pathlib import Path

from cascade.bundle.bundle import BundleError

CARD, SUMS = "cascade.json", "SHA256SUMS"
FILE_NAME = re.compile(r"[a-z]+(\.[a-z]+)+|SHA256SUMS")
MAX_BYTES = 2**31  # of one file; a bundle is megabytes
RESERVED = "auto"
MAX_FILES = 16  # per bundle; it has at most twelve
CARD_BYTES = 2**22  # of the card, which is parsed as JSON
NAME = re.compile(r"\w([\w. -]{0,62}[\w.-])?")
"""A bundle's name or version. Both are used in paths, URLs, HTTP headers and metric labels."""
JUNK = ("Thumbs.db", "desktop.ini")


def check_name(path: Path) -> tuple[str, str]:
    """Name and version of the bundle at ``<name>/<version>``; symbolic links are not followed.

    Raises:
        BundleError: one of them is not allowed.
    """
    path = Path(os.path.abspath(path))  # gives "." a name, too
    if path.parent.name == RESERVED:
        raise BundleError(f"{RESERVED!r} is reserved for requests to be dispatched: choose another name for the bundle")
    for part in (path.parent.name, path.name):
        if not NAME.fullmatch(part) or unicodedata.normalize("NFC", part) != part:
            raise BundleError(
                f"{part!r} can't be the name or version of a bundle: use at most 64 letters, digits, '_', '-', '.' and"
                " spaces, and begin with a letter, a digit or '_' (Unicode in NFC form)"
            )
    return path.parent.name, path.name


def listed(path: Path) -> dict[str, str]:
    """SHA-256 in hex by file name, as listed in ``SHA256SUMS``.

    Raises:
        BundleError: the folder does not hold exactly these files (besides hidden ones), or one of them is too large.
        OSError: the folder can't be read.
    """
    if not (path / CARD).is_file():
        raise BundleError(f"no bundle at {path}: {CARD} is missing; a bundle is a folder <name>/<version>")
    if (path / SUMS).stat().st_size > 2**16:
        raise BundleError(f"{path / SUMS} is too large for a list of {MAX_FILES} files; copy the bundle again")
    sums = (path / SUMS).read_bytes()
    well_formed = re.fullmatch(rb"(?:[0-9a-f]{64}  [a-z.]+\n)+", sums)
    entries = {line[66:].decode(): line[:64].decode() for line in sums.splitlines()} if well_formed else {}
    with os.scandir(path) as found:  # pathlib takes twice as long, and a store may have thousands of bundles
        present = {e.name: e for e in found if not e.name.startswith(".") and e.name not in (SUMS, *JUNK)}
    if present.keys() != entries.keys() or len(entries) > MAX_FILES:
        mismatches = ", ".join(sorted(present.keys() ^ entries.keys()))
        raise BundleError(
            f"{path / SUMS} does not match the files in its folder ({mismatches}); copy the whole bundle again"
        )
    for name in entries:
        entry = present[name]
        if not entry.is_file():  # opening a named pipe would wait forever
            raise BundleError(f"{path / name} is not a file; copy the bundle again")
        limit = CARD_BYTES if name == CARD else MAX_BYTES
        if entry.stat().st_size > limit:
            raise BundleError(f"{path / name} is larger than {limit} bytes, too large for a file of a bundle")
    return entries


def size(path: Path) -> int:
    """Total bytes of a bundle's files, without reading their content. Raises as ``listed``."""
    return sum((path / name).stat().st_size for name in listed(path))


def read(path: Path, only: Collection[str] | None = None) -> tuple[dict[str, bytes], str]:
    """Read every file except ``SHA256SUMS`` and verify its checksum; also the bundle's digest. Raises as ``listed``.

    Args:
        only: the files to read; None for all.
    """
    files, checksums = {}, listed(path)
    for name, checksum in checksums.items():
        if only is not None and name not in only:
            continue
        files[name] = (path / name).read_bytes()
        if hashlib.sha256(files[name]).hexdigest() != checksum:
            raise BundleError(
                f"{path / name}: its checksum differs from {SUMS}; the file was changed or truncated: copy it again"
            )
    return files, hashlib.sha256(_lines(checksums)).hexdigest()


def sums_of(files: Mapping[str, bytes]) -> bytes:
    """The content of ``SHA256SUMS`` for these files."""
    return _lines({name: hashlib.sha256(raw).hexdigest() for name, raw in files.items()})


def digest_of(files: Mapping[str, bytes]) -> str:
    """Digest that identifies a bundle, in hex: the SHA-256 of its ``SHA256SUMS``, so it covers every byte."""
    return hashlib.sha256(sums_of(files)).hexdigest()


def _lines(checksums: Mapping[str, str]) -> bytes:
    return "".join(f"{checksum}  {name}\n" for name, checksum in sorted(checksums.items())).encode()
