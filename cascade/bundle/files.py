"""The files of a bundle on disk: which there are, their checksums, and an atomic write.

A bundle is foreign input. Its size is checked before a byte is read, and hidden files, which operating systems leave
everywhere (``.DS_Store``, ``._x``, ``.nfs...``, the links of a Kubernetes ConfigMap), are ignored.
"""

import hashlib
import os
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path

from cascade.bundle.bundle import BundleError

CARD, SUMS = "cascade.json", "SHA256SUMS"
FILE_NAME = re.compile(r"[a-z]+(\.[a-z]+)+|SHA256SUMS")
MAX_BYTES = 2**31  # of one file; a bundle is megabytes
RESERVED = "auto"
MAX_FILES = 16  # of a bundle; it has eleven at most
CARD_BYTES = 2**22  # of the card, which is parsed as JSON
NAME = re.compile(r"\w([\w. -]{0,62}[\w.-])?")
"""A bundle's name, or its version. It becomes a path, a part of a URL, an HTTP header and a label of a metric."""
JUNK = ("Thumbs.db", "desktop.ini")


def check_name(path: Path) -> tuple[str, str]:
    """Name and version of the bundle at ``<name>/<version>``; symbolic links are not followed.

    Raises:
        BundleError: one of them can't be used everywhere.
    """
    path = Path(os.path.abspath(path))  # "." has a name, too
    if path.parent.name == RESERVED:
        raise BundleError(f"no bundle can be called {RESERVED!r}: requests say it to have an image dispatched")
    for part in (path.parent.name, path.name):
        if not NAME.fullmatch(part) or unicodedata.normalize("NFC", part) != part:
            raise BundleError(
                f"{part!r} can't be the name or version of a bundle: use letters, digits, '_', '-', '.' and spaces,"
                " 64 at most, and begin with a letter, a digit or '_' (Unicode in its NFC form)"
            )
    return path.parent.name, path.name


def listed(path: Path) -> dict[str, str]:
    """SHA-256 in hex by file name, as ``SHA256SUMS`` has it, without itself.

    Raises:
        BundleError: the folder does not hold just these files (hidden ones aside), or one of them is too large.
        OSError: the folder can't be read.
    """
    if not (path / CARD).is_file():
        raise BundleError(f"no bundle at {path}: {CARD} is missing; a bundle is a folder <name>/<version>")
    if (path / SUMS).stat().st_size > 2**16:
        raise BundleError(f"{path / SUMS} is too large for a list of {MAX_FILES} files; copy the bundle again")
    sums = (path / SUMS).read_bytes()
    well_formed = re.fullmatch(rb"(?:[0-9a-f]{64}  [a-z.]+\n)+", sums)
    entries = {line[66:].decode(): line[:64].decode() for line in sums.splitlines()} if well_formed else {}
    present = {p.name for p in path.iterdir() if not p.name.startswith(".") and p.name not in JUNK} - {SUMS}
    if present != set(entries) or len(entries) > MAX_FILES:
        odd = ", ".join(sorted(present ^ set(entries)))
        raise BundleError(
            f"{path / SUMS} does not list just the files in its folder ({odd}); copy the bundle again, whole"
        )
    for name in entries:
        if not (path / name).is_file():  # opening a named pipe would wait forever
            raise BundleError(f"{path / name} is not a file; copy the bundle again")
        most = CARD_BYTES if name == CARD else MAX_BYTES
        if (path / name).stat().st_size > most:
            raise BundleError(f"{path / name} is larger than {most} bytes; no such file of a bundle is")
    return entries


def size(path: Path) -> int:
    """Bytes of all files of a bundle; nothing but their sizes is read. Raises as ``listed``."""
    return sum((path / name).stat().st_size for name in listed(path))


def read(path: Path) -> dict[str, bytes]:
    """The content of every file but ``SHA256SUMS``, each compared with its checksum. Raises as ``listed``."""
    files = {}
    for name, checksum in listed(path).items():
        files[name] = (path / name).read_bytes()
        if hashlib.sha256(files[name]).hexdigest() != checksum:
            raise BundleError(
                f"{path / name}: its checksum is not the one in {SUMS}; the file was changed or cut: copy it again"
            )
    return files


def sums_of(files: Mapping[str, bytes]) -> bytes:
    """The content of ``SHA256SUMS`` for these files."""
    return "".join(f"{hashlib.sha256(raw).hexdigest()}  {name}\n" for name, raw in sorted(files.items())).encode()


def digest_of(files: Mapping[str, bytes]) -> str:
    """What identifies a bundle, in hex: the SHA-256 of its ``SHA256SUMS``, so it covers every byte."""
    return hashlib.sha256(sums_of(files)).hexdigest()
