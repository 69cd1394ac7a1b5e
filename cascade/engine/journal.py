"""A journal of the bundles being loaded, which outlives the process.

A bundle that passes every check may still need more memory than there is, or crash a native library. Then the process
dies while it loads the bundle, and the next one reads in the journal which bundle that was.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from cascade.bundle.store import Identity


class Journal:
    """Deaths by bundle and stamp.

    Args:
        file: descriptor of a file that the next process inherits, too, such as ``os.memfd_create`` makes; None for no
            memory of earlier processes.
    """

    def __init__(self, file: int | None = None) -> None:
        self._file = file
        self._deaths: dict[str, int] = {}
        if file is not None:
            with suppress(ValueError):  # empty, or the process died while it was writing
                self._deaths = dict(json.loads(os.pread(file, os.fstat(file).st_size, 0).rstrip(b"\0")))

    def deaths(self, identity: Identity, stamp: str) -> int:
        """How many processes died while they loaded these files."""
        return self._deaths.get(_key(identity, stamp), 0)

    @contextmanager
    def loading(self, identity: Identity, stamp: str) -> Iterator[None]:
        """Load a bundle in the block. A block that ends, even by an exception, clears the bundle's deaths."""
        key = _key(identity, stamp)
        self._write({**self._deaths, key: self._deaths.get(key, 0) + 1})
        try:
            yield
        finally:
            self._write({k: deaths for k, deaths in self._deaths.items() if k != key})

    def _write(self, deaths: dict[str, int]) -> None:
        self._deaths = deaths
        if self._file is not None:
            size = os.fstat(self._file).st_size  # never made shorter, so that a preallocated file needs no room later
            os.pwrite(self._file, json.dumps(deaths).encode().ljust(size), 0)


def _key(identity: Identity, stamp: str) -> str:
    return json.dumps([*identity, stamp])
