"""A value that is read from files, and read again when they change."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from cascade.errors import CascadeError

T = TypeVar("T")
log = logging.getLogger(__name__)


class Watched(Generic[T]):
    """The value of files, reloaded when they change.

    If the changed files are invalid, an error is logged and the old value stays, so that an incomplete file locks
    nobody out.

    Args:
        read: takes the paths.

    Raises:
        CascadeError: as ``read``, at the first reading.
    """

    def __init__(self, read: Callable[..., T], *paths: Path) -> None:
        self.paths, self._read = paths, read
        self._stamp = self._look()
        self.value = read(*paths)

    def refresh(self) -> T:
        """The current value."""
        if (stamp := self._look()) != self._stamp:
            self._stamp = stamp
            try:
                self.value = self._read(*self.paths)
                log.warning("read again: %s", ", ".join(map(str, self.paths)))
            except CascadeError as error:
                log.error("%s; what was read before stays valid", error)
        return self.value

    def _look(self) -> list[tuple[int, int, int] | None]:
        return [_stamp(path) for path in self.paths]


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size
