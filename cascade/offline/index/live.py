"""An index that follows its folder: a server reads it again after ``cascade index add`` or ``remove``."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cascade.errors import CascadeError
from cascade.offline.index.files import CARD, read

log = logging.getLogger(__name__)


class LiveIndex:
    """The newest readable state of an index; while a new one is read, both are in memory.

    Attributes:
        index: the current one. Use it once per request, since it may be replaced meanwhile.

    Raises:
        CascadeError: as ``read``, at the first reading.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stamp = self._look()
        self.index = read(folder)

    def refresh(self) -> None:
        """Read the index again if its card has changed; an unreadable one is logged, and the old one stays."""
        if (stamp := self._look()) == self._stamp:
            return
        self._stamp = stamp
        try:
            self.index = read(self.folder)
            log.warning("the index was read again: %d rows", self.index.about.rows)
        except CascadeError as error:
            log.error("%s; the old index stays", error)

    @contextmanager
    def watching(self, interval: float) -> Iterator[None]:
        """``refresh`` every ``interval`` seconds, in a thread, until the block ends; 0 for never."""
        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(interval):
                try:
                    self.refresh()
                except Exception:  # a bug, or out of memory, must not end the watch silently
                    log.exception("the index could not be read again")

        if interval > 0:
            threading.Thread(target=watch, name="cascade-index", daemon=True).start()
        try:
            yield
        finally:
            stop.set()  # reading a large index may take long; it ends with the process

    def _look(self) -> tuple[int, int, int] | None:
        try:
            stat = (self.folder / CARD).stat()
        except OSError:
            return None
        return stat.st_ino, stat.st_mtime_ns, stat.st_size
