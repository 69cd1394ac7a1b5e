"""A model store: a folder or any fsspec URL with bundles as ``<name>/<version>/``, read whole or not at all.

Bundles of a URL are copied into a folder of this machine, verified before anything can take them for whole, and
read from there: so a worker that is started again downloads nothing, and starts even if the store is out of reach.
"""

import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Callable
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
from cascade.bundle.format import read
from cascade.bundle.location import is_url
from cascade.cache import cache_folder, sweep, used
from cascade.errors import CascadeError, brief

T = TypeVar("T")
Identity = tuple[str, str]
"""(name, version) of a bundle."""
ABANDONED = 3600.0
"""Seconds without a write after which a half-made copy is removed."""
COPIES = "[0-9a-f]" * 16
"""Matches the folders with the copies of a store, beside each other in a cache."""
TIMEOUTS = {"sock_connect": 5, "sock_read": 10}  # seconds, over HTTP; the clients of S3 and the like have their own
ROOM = "make room for copies of the store's bundles"
PATH = re.compile(r"(?<![\w.:/])(?:/[^\s/:;,'\"()]+)+/(?=[^\s/:;,'\"()])")
"""The folders of a path that begins at the root of a machine."""
log = logging.getLogger(__name__)


class StoreError(CascadeError):
    """The store can't be read, or the folder for its copies can't be written: worth another try later."""


class Store:
    """Where bundles come from.

    Args:
        where: a folder, or a URL that fsspec knows (``s3://bucket/models``, ``https://host/models``, ``memory://m``).
        cache: the folder for copies of remote bundles; None for one below ``~/.cache/cascade``.

    Raises:
        StoreError: fsspec doesn't know the URL, lacks a package for it, or it holds a password.
    """

    def __init__(self, where: str | Path, cache: Path | None = None) -> None:
        self.where = str(where)
        self.folder: Path | None = Path(where)
        self.cache: Path | None = None
        self._away = False
        if not is_url(self.where):
            return
        if urlsplit(self.where).password:
            raise StoreError("the store's URL holds a password: give it by the environment or fsspec's configuration")
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
        """Every bundle that lies there, good or bad, with a stamp that differs when a file of it was changed.

        Raises:
            StoreError: the store is out of reach.
        """
        folder = self.folder
        if folder is not None:
            return _within(lambda: _listed(folder), "is it mounted?")
        assert self.cache is not None
        used(self.cache)
        self._away = True
        found = self._reach(self._look)
        self._away = False
        return found

    def cached(self) -> dict[Identity, str]:
        """The bundles of which a whole copy lies on this machine: what there is while the store is out of reach."""
        return _listed(self.cache) if self.cache is not None and self.cache.is_dir() else {}

    def read(self, name: str, version: str, memory: int | None = None) -> tuple[Bundle, str]:
        """A bundle, verified, and the digest of its checksums (equal where, and only where, all its bytes are).

        After a look in vain the copy is taken unseen: a store that hangs would be waited for once a bundle.

        Raises:
            BundleError: what is wrong with it.
            OutOfMemory: it needs more than ``memory`` bytes.
            StoreError: it can't be reached, or copied to this machine.
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
                log.warning("a copy was damaged on this machine and is fetched again: %s", error)
        return self._copy(files, there, copy, memory)

    def public(self, text: str) -> str:
        """A text about this store's bundles for people outside: files by bundle and name, without the way there."""
        for root in (self.cache, self.folder, None if self.folder else self.root.rstrip("/")):
            text = re.sub(rf"(?<![\w./-]){re.escape(str(root))}/", "", text) if root else text
        return PATH.sub("", text)

    def prune(self, keep: dict[Identity, str]) -> None:
        """Delete the copies of bundles that the store no longer holds."""
        for name, version in self.cached().keys() - keep.keys():
            assert self.cache is not None
            shutil.rmtree(self.cache / name / version, ignore_errors=True)

    def _look(self) -> dict[Identity, str]:
        self.fs.invalidate_cache()
        found = {}
        for bundle in self._folders(self.root):
            for version in self._folders(bundle):
                entries = self._entries(version)
                files = {_base(e["name"]): e for e in entries}
                if CARD not in files:
                    continue
                stamp = repr(sorted((name, sorted(map(str, e.items()))) for name, e in files.items()))
                if SUMS in files and any(e.get("size") is None for e in files.values()):  # HTTP says names and no more
                    stamp += self.fs.cat_file(files[SUMS]["name"]).decode(errors="replace")
                found[_base(bundle), _base(version)] = stamp
        return found

    def _folders(self, path: str) -> list[str]:
        listed = self.fs.ls(path, detail=True) if path == self.root else self._entries(path)
        entries = [e for e in listed if e["name"].rstrip("/") != path.rstrip("/")]
        return sorted(e["name"] for e in entries if e["type"] == "directory" and NAME.fullmatch(_base(e["name"])))

    def _entries(self, path: str) -> list[dict[str, Any]]:
        """What is in a folder below the root; nothing if it is gone by now: a stale link costs the others nothing."""
        try:
            return list(self.fs.ls(path, detail=True))
        except FileNotFoundError:
            return []

    def _files(self, path: str) -> dict[str, str]:
        """Full names by the names of the files in a remote folder."""
        self.fs.invalidate_cache()
        return {_base(e["name"]): e["name"] for e in self.fs.ls(path, detail=True)}

    def _copy(self, files: dict[str, str], there: str, copy: Path, memory: int | None) -> tuple[Bundle, str]:
        """Fetch a bundle: every file synced, the whole verified, then renamed to where it is looked for."""
        assert self.cache is not None
        staging = self.cache / f".{os.getpid()}-{uuid4().hex}"
        here = staging / copy.parent.name / copy.name
        if foreign := [name for name in files if not NAME.fullmatch(name)] or sorted(files)[MAX_FILES:]:
            raise BundleError(f"{there}: {foreign[0]!r} is no file of a bundle; copy the bundle again")
        try:
            _within(lambda: here.mkdir(parents=True), ROOM)
            for name, remote in sorted(files.items()):  # HTTP lists them in an order of its own
                self._fetch(remote, here / name)
            try:
                found = _read(here, (copy.parent.name, copy.name), memory)
            except BundleError as error:
                raise BundleError(str(error).replace(str(here), there)) from None
            _within(lambda: _replace(here, copy), ROOM)
            return found
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _fetch(self, remote: str, here: Path) -> None:
        _within(lambda: self._save(remote, here), ROOM)  # the whole: closing a file writes, too, and can fail

    def _save(self, remote: str, here: Path) -> None:
        with self._reach(lambda: self.fs.open(remote, "rb")) as source, open(here, "xb") as out:
            size = 0
            while block := self._reach(lambda: source.read(2**20)):
                size += out.write(block)
                if size > MAX_BYTES:
                    raise BundleError(f"{remote} is larger than {MAX_BYTES} bytes; no part of a bundle is")
            out.flush()
            os.fsync(out.fileno())

    def _reach(self, ask: Callable[[], T]) -> T:
        """Ask the remote store; whatever its client raises (each has classes of its own) is a StoreError."""
        try:
            return ask()
        except Exception as error:
            raise StoreError(f"the store {self.where} can't be read ({brief(error)}): is it in reach?") from error

    @staticmethod
    def _sweep(cache: Path) -> None:
        """Remove copies that were cut off long ago. Process ids tell nothing where containers share the folder."""
        for path in cache.glob(".*-*"):
            with suppress(FileNotFoundError):  # another process removes it
                if time.time() - max(p.stat().st_mtime for p in (path, *path.rglob("*"))) > ABANDONED:
                    shutil.rmtree(path, ignore_errors=True)


def _timeouts(where: str) -> dict[str, object]:
    """fsspec's options, so that a server that takes connections and says nothing is out of reach soon."""
    if urlsplit(where).scheme not in ("http", "https") or "::" in where:
        return {}
    from fsspec.implementations.http import aiohttp  # what fsspec itself takes these times as

    return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(**TIMEOUTS)}}


def discover(store: Path) -> list[Path]:
    """Folders ``<name>/<version>`` of a store that hold a card, sorted; hidden ones (being written) are passed over."""
    cards = (p.parent for p in Path(store).glob(f"*/*/{CARD}"))
    return sorted(p for p in cards if not any(part.startswith(".") for part in (p.name, p.parent.name)))


def _listed(folder: Path) -> dict[Identity, str]:
    """The bundles of a folder of this machine with their stamps. Raises OSError where it can't be read."""
    while True:
        names = set(os.listdir(folder))  # glob says nothing where a folder is missing or may not be read
        found = {}
        for path in discover(folder):
            with suppress(FileNotFoundError):  # this bundle is just being taken away
                files = [(p.name, p.stat()) for p in sorted(path.iterdir())]
                found[path.parent.name, path.name] = repr([(n, s.st_size, s.st_mtime_ns, s.st_ino) for n, s in files])
        if names <= set(os.listdir(folder)):
            return found  # else something went meanwhile, perhaps the whole store: half a look is none


def _read(path: Path, identity: Identity, memory: int | None) -> tuple[Bundle, str]:
    """A bundle of this machine and its digest; a disk that can't be read is no fault of the bundle."""
    try:
        check_name(path.parent.parent / identity[0] / identity[1])
        bundle = read(path, identity, memory)
        return bundle, bundle.digest
    except BundleError as error:
        if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError):
            raise StoreError(str(error)) from error
        raise


def _replace(here: Path, copy: Path) -> None:
    """Put a whole copy in its place; a worker beside us may have put the same one there."""
    sync(here)
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(copy, ignore_errors=True)
    here.rename(copy)
    sync(copy.parent)


def _within(do: Callable[[], T], advice: str) -> T:
    """Do something with a folder of this machine; an OSError is a StoreError."""
    try:
        return do()
    except OSError as error:
        raise StoreError(f"{error.filename or 'model store'}: {error.strerror}: {advice}") from error


def _base(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]
