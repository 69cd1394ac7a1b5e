"""A journal of the bundles being loaded, which survives the process.

A bundle that passes every check may still run out of memory or crash a native library. Then the process dies while it
loads the bundle, and the next process finds in the journal which bundle it was.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from cascade.bundle.store import Identity


class Journal:
    """Number of crashes by bundle and stamp.

    Args:
        file: descriptor that the next process inherits, such as one from ``os.memfd_create``; None to forget earlier
            processes.
    """

    def __init__(self, file: int | None = None) -> None:
        self._file = file
        self._deaths: dict[str, int] = {}
        if file is not None:
            with suppress(ValueError):  # empty, or the process died while it was writing
                self._deaths = dict(json.loads(os.pread(file, os.fstat(file).st_size, 0).rstrip(b"\0")))

    def deaths(self, identity: Identity, stamp: str) -> int:
        """How many processes died while loading these files."""
        return self._deaths.get(_key(identity, stamp), 0)

    @contextmanager
    def loading(self, identity: Identity, stamp: str) -> Iterator[None]:
        """Record that the block loads a bundle. When the block ends, even by an exception, the record is cleared."""
        key = _key(identity, stamp)
        self._write({**self._deaths, key: self._deaths.get(key, 0) + 1})
        try:
            yield
        finally:
            self._write({k: deaths for k, deaths in self._deaths.items() if k != key})

    def _write(self, deaths: dict[str, int]) -> None:
        self._deaths = deaths
        if self._file is not None:
            size = os.fstat(self._file).st_size  # never truncated, so that a preallocated file needs no space later
            os.pwrite(self._file, json.dumps(deaths).encode().ljust(size), 0)


def _key(identity: Identity, stamp: str) -> str:
    return json.dumps([*identity, stamp])
