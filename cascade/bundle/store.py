"""A model store: a folder or any fsspec URL with bundles as ``<name>/<version>/``, each read atomically.

Bundles from a URL are downloaded to a local cache, verified before they become visible, and read from there. So a
restarted worker downloads nothing, and starts even if the store is unreachable.
"""

import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit
from uuid import uuid4

import fsspec
from fsspec.implementations.local import LocalFileSystem

from cascade.atomic import sync
from cascade.bundle.bundle import Bundle, BundleError
from cascade.bundle.files import CARD, MAX_BYTES, MAX_FILES, NAME, SUMS, check_name
from cascade.bundle.format import read, read_domain
from cascade.bundle.location import is_url
from cascade.bundle.schema import Card
from cascade.cache import cache_folder, sweep, used
from cascade.errors import CascadeError, brief
from cascade.model.domain import Domain

T = TypeVar("T")
Identity = tuple[str, str]
"""(name, version) of a bundle."""
ABANDONED = 3600.0
"""Seconds without a write after which an incomplete copy is removed."""
COPIES = "[0-9a-f]" * 16
"""Glob for the folders of a cache; each holds the copies of one store."""
TIMEOUTS = {"sock_connect": 5, "sock_read": 10}  # seconds, over HTTP; clients of S3 and the like have their own
ROOM = "free disk space for copies of the store's bundles"
PATH = re.compile(r"(?<![\w.:/])(?:/[^\s/:;,'\"()]+)+/(?=[^\s/:;,'\"()])")
"""The folders of an absolute path."""
log = logging.getLogger(__name__)


class StoreError(CascadeError):
    """The store can't be read, or its cache can't be written: retry later."""


class Store:
    """Where bundles come from.

    Args:
        where: a folder, or a URL for fsspec (``s3://bucket/models``, ``https://host/models``, ``memory://m``).
        cache: the folder for copies of remote bundles; None for one below ``~/.cache/cascade``.

    Raises:
        StoreError: fsspec does not support the URL, lacks a package for it, or the URL contains a password.
    """

    def __init__(self, where: str | Path, cache: Path | None = None) -> None:
        self.where = str(where)
        self.folder: Path | None = Path(where)
        self.cache: Path | None = None
        self._away = False
        if not is_url(self.where):
            return
        if urlsplit(self.where).password:
            raise StoreError("the store's URL contains a password: set it in the environment or fsspec's configuration")
        try:
            self.fs, self.root = fsspec.core.url_to_fs(self.where, **_timeouts(self.where))
        except (ValueError, ImportError) as error:
            raise StoreError(f"can't open the store {self.where} ({brief(error)}): see fsspec's list of URLs") from None
        self.folder = Path(self.root) if isinstance(self.fs, LocalFileSystem) else None
        if self.folder is None:
            self.cache = (cache or cache_folder()) / hashlib.sha256(self.where.encode()).hexdigest()[:16]
            used(self.cache)
            sweep(self.cache.parent, COPIES)
            self._sweep(self.cache)

    def look(self) -> dict[Identity, str]:
        """List every bundle, valid or not, with a stamp that changes whenever one of its files does.

        Raises:
            StoreError: the store is unreachable.
        """
        folder = self.folder
        if folder is not None:
            return _within(lambda: _listed(folder), "is it mounted?")
        assert self.cache is not None
        used(self.cache)
        self._away = True
        stamps = self._reach(self._look)
        self._away = False
        return stamps

    def cached(self) -> dict[Identity, str]:
        """List the bundles with a complete local copy, which can be served while the store is unreachable."""
        return _listed(self.cache) if self.cache is not None and self.cache.is_dir() else {}

    def read(self, name: str, version: str, memory: int | None = None) -> tuple[Bundle, str]:
        """Read and verify a bundle; also return the digest of its checksums (equal if and only if all its bytes are).

        After a failed ``look`` the local copy is used without asking the store, because a store that hangs would
        otherwise cost a timeout per bundle.

        Raises:
            BundleError: the bundle is invalid.
            OutOfMemory: it needs more than ``memory`` bytes.
            StoreError: the store is unreachable, or the bundle can't be copied to this machine.
        """
        if self.folder is not None:
            return _read(self.folder / name / version, (name, version), memory)
        assert self.cache is not None
        copy, there = self.cache / name / version, f"{self.root.rstrip('/')}/{name}/{version}"
        if self._away and copy.is_dir():
            return _read(copy, (name, version), memory)
        try:
            files = self._reach(lambda: self._files(there))
            sums = self._reach(lambda: self.fs.cat_file(files[SUMS])) if SUMS in files else b""
        except StoreError:
            if not copy.is_dir():
                raise
            return _read(copy, (name, version), memory)
        if (copy / SUMS).is_file() and (copy / SUMS).read_bytes() == sums:
            try:
                return _read(copy, (name, version), memory)
            except BundleError as error:
                log.warning("a local copy is damaged and will be downloaded again: %s", error)
        return self._copy(files, there, copy, memory)

    def read_domain(self, name: str, version: str) -> tuple[Card, Domain | None] | None:
        """The card and the domain of a bundle; None for one of a remote store that was never downloaded.

        Raises:
            BundleError: they are invalid, or can't be read.
        """
        folder = (self.folder or self.cache or Path()) / name / version
        return read_domain(folder) if self.folder is not None or folder.is_dir() else None

    def public(self, text: str) -> str:
        """Redact a text about this store's bundles for clients: bundle and file names stay, the paths to them go."""
        for root in (self.cache, self.folder, None if self.folder else self.root.rstrip("/")):
            text = re.sub(rf"(?<![\w./-]){re.escape(str(root))}/", "", text) if root else text
        return PATH.sub("", text)

    def prune(self, keep: dict[Identity, str]) -> None:
        """Delete the local copies of bundles that are no longer in the store."""
        for name, version in self.cached().keys() - keep.keys():
            assert self.cache is not None
            shutil.rmtree(self.cache / name / version, ignore_errors=True)

    def _look(self) -> dict[Identity, str]:
        self.fs.invalidate_cache()
        stamps = {}
        for bundle in self._folders(self.root):
            for version in self._folders(bundle):
                entries = self._entries(version)
                files = {_base(e["name"]): e for e in entries}
                if CARD not in files:
                    continue
                stamp = repr(sorted((name, sorted(map(str, e.items()))) for name, e in files.items()))
                if SUMS in files and any(e.get("size") is None for e in files.values()):  # HTTP lists names only
                    stamp += self.fs.cat_file(files[SUMS]["name"]).decode(errors="replace")
                stamps[_base(bundle), _base(version)] = stamp
        return stamps

    def _folders(self, path: str) -> list[str]:
        listed = self.fs.ls(path, detail=True) if path == self.root else self._entries(path)
        entries = [e for e in listed if e["name"].rstrip("/") != path.rstrip("/")]
        return sorted(e["name"] for e in entries if e["type"] == "directory" and NAME.fullmatch(_base(e["name"])))

    def _entries(self, path: str) -> list[dict[str, Any]]:
        """List a folder below the root; empty if it is gone, so that a stale link does not affect other bundles."""
        try:
            return list(self.fs.ls(path, detail=True))
        except FileNotFoundError:
            return []

    def _files(self, path: str) -> dict[str, str]:
        """Full paths of the files in a remote folder, by file name."""
        self.fs.invalidate_cache()
        return {_base(e["name"]): e["name"] for e in self.fs.ls(path, detail=True)}

    def _copy(self, files: dict[str, str], there: str, copy: Path, memory: int | None) -> tuple[Bundle, str]:
        """Download a bundle atomically: sync every file, verify the bundle, then rename the folder into place."""
        assert self.cache is not None
        staging = self.cache / f".{os.getpid()}-{uuid4().hex}"
        here = staging / copy.parent.name / copy.name
        if foreign := [name for name in files if not NAME.fullmatch(name)] or sorted(files)[MAX_FILES:]:
            raise BundleError(f"{there}: {foreign[0]!r} does not belong to a bundle; copy the bundle again")
        try:
            _within(lambda: here.mkdir(parents=True), ROOM)
            for name, remote in sorted(files.items()):  # HTTP lists them in any order
                self._fetch(remote, here / name)
            try:
                bundle_and_digest = _read(here, (copy.parent.name, copy.name), memory)
            except BundleError as error:
                raise BundleError(str(error).replace(str(here), there)) from None
            _within(lambda: _replace(here, copy), ROOM)
            return bundle_and_digest
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _fetch(self, remote: str, here: Path) -> None:
        _within(lambda: self._save(remote, here), ROOM)  # all of it: closing a file also writes, and can fail

    def _save(self, remote: str, here: Path) -> None:
        with self._reach(lambda: self.fs.open(remote, "rb")) as source, open(here, "xb") as out:
            size = 0
            while block := self._reach(lambda: source.read(2**20)):
                size += out.write(block)
                if size > MAX_BYTES:
                    raise BundleError(f"{remote} is larger than {MAX_BYTES} bytes, too large for a file of a bundle")
            out.flush()
            os.fsync(out.fileno())

    def _reach(self, ask: Callable[[], T]) -> T:
        """Call the remote store; turn whatever its client raises (each has its own classes) into a StoreError."""
        try:
            return ask()
        except Exception as error:
            raise StoreError(f"the store {self.where} can't be read ({brief(error)}): is it reachable?") from error

    @staticmethod
    def _sweep(cache: Path) -> None:
        """Remove abandoned downloads by age. Process ids are meaningless if containers share the folder."""
        for path in cache.glob(".*-*"):
            with suppress(FileNotFoundError):  # another process is removing it
                if time.time() - max(p.stat().st_mtime for p in (path, *path.rglob("*"))) > ABANDONED:
                    shutil.rmtree(path, ignore_errors=True)


def _timeouts(where: str) -> dict[str, object]:
    """fsspec's timeouts, so that a server that accepts connections but never answers counts as unreachable soon."""
    if urlsplit(where).scheme not in ("http", "https") or "::" in where:
        return {}
    from fsspec.implementations.http import aiohttp  # the class in which fsspec expects timeouts

    return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(**TIMEOUTS)}}


def discover(store: str) -> Iterator[Identity]:
    """Folders ``<name>/<version>`` of a store, sorted; hidden ones (being written) are skipped."""
    for name in _names(store):
        for version in _names(f"{store}/{name}"):
            yield name, version


def _names(folder: str) -> list[str]:
    """Sorted names in a folder without the hidden ones; none if it is no folder or can't be read."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError:
        return []


def _listed(folder: Path) -> dict[Identity, str]:
    """List the bundles of a local folder, which have a card, with their stamps. Raises OSError if it can't be read."""
    store = os.fspath(folder)  # pathlib takes twice as long for 10,000 bundles
    while True:
        names = set(os.listdir(store))  # glob ignores a missing or unreadable folder
        stamps = {}
        for name, version in discover(store):
            if (stamp := _stamp(f"{store}/{name}/{version}")) is not None:
                stamps[name, version] = stamp
        if names <= set(os.listdir(store)):
            return stamps  # else something vanished meanwhile, perhaps the whole store: list again


def _stamp(folder: str) -> str | None:
    """Sizes, times and inodes of a bundle's files; None if it has no card, can't be read, or is being removed."""
    try:
        with os.scandir(folder) as entries:
            files = sorted((entry.name, entry.stat()) for entry in entries)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    facts = [f"{name} {s.st_size} {s.st_mtime_ns} {s.st_ino}" for name, s in files]
    return "\n".join(facts) if any(name == CARD for name, _ in files) else None


def _read(path: Path, identity: Identity, memory: int | None) -> tuple[Bundle, str]:
    """Read a local bundle and its digest; a disk error is a StoreError, because the bundle is not at fault."""
    try:
        check_name(path.parent.parent / identity[0] / identity[1])
        bundle = read(path, identity, memory)
        return bundle, bundle.digest
    except BundleError as error:
        if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError):
            raise StoreError(str(error)) from error
        raise


def _replace(here: Path, copy: Path) -> None:
    """Rename a complete copy into place; another worker may have put the same one there."""
    sync(here)
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(copy, ignore_errors=True)
    here.rename(copy)
    sync(copy.parent)


def _within(do: Callable[[], T], advice: str) -> T:
    """Do something with a local folder; turn an OSError into a StoreError."""
    try:
        return do()
    except OSError as error:
        raise StoreError(f"{error.filename or 'model store'}: {error.strerror}: {advice}") from error


def _base(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]
