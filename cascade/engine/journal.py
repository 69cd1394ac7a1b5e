"""A journal of the bundles being loaded, and of pins set while serving, which survives the process.

A bundle that passes every check may still run out of memory or crash a native library. Then the process dies while it
loads the bundle, and the next process finds in the journal which bundle it was.
"""

import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

from cascade.bundle.store import Identity


class Journal:
    """Number of crashes by bundle and stamp, and pins by name.

    Args:
        file: descriptor that the next process inherits, such as one from ``os.memfd_create``; None to forget earlier
            processes.
    """

    def __init__(self, file: int | None = None) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._deaths: dict[str, int] = {}
        self._pins: dict[str, str | None] = {}
        if file is not None:
            with suppress(ValueError):  # empty, or the process died while it was writing
                content = json.loads(os.pread(file, os.fstat(file).st_size, 0).rstrip(b"\0"))
                self._deaths, self._pins = content["deaths"], content["pins"]

    @property
    def pins(self) -> Mapping[str, str | None]:
        """The text of each pin that was set while serving; None for one that was removed."""
        return self._pins

    def pin(self, name: str, text: str | None) -> None:
        """Record a pin, or that it was removed."""
        with self._lock:
            self._pins = {**self._pins, name: text}
            self._write()

    def deaths(self, identity: Identity, stamp: str) -> int:
        """How many processes died while loading these files."""
        return self._deaths.get(_key(identity, stamp), 0)

    @contextmanager
    def loading(self, identity: Identity, stamp: str) -> Iterator[None]:
        """Record that the block loads a bundle. When the block ends, even by an exception, the record is cleared."""
        key = _key(identity, stamp)
        with self._lock:
            self._deaths = {**self._deaths, key: self._deaths.get(key, 0) + 1}
            self._write()
        try:
            yield
        finally:
            with self._lock:
                self._deaths = {k: deaths for k, deaths in self._deaths.items() if k != key}
                self._write()

    def _write(self) -> None:
        if self._file is not None:
            size = os.fstat(self._file).st_size  # never truncated, so that a preallocated file needs no space later
            content = json.dumps({"deaths": self._deaths, "pins": self._pins})
            os.pwrite(self._file, content.encode().ljust(size), 0)


def _key(identity: Identity, stamp: str) -> str:
    return json.dumps([*identity, stamp])
