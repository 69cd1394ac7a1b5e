"""The folder of everything that can be measured or downloaded again, and how long unused parts of caches are kept."""

import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

UNUSED = 30 * 24 * 3600.0
"""Seconds after which what nobody has used is removed."""


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/cascade`` or ``~/.cache/cascade``; it may not exist yet.

    A user without a home, such as a container's user ID without HOME and passwd entry, gets a temporary folder.
    """
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # neither HOME nor an entry in /etc/passwd
        return Path(tempfile.gettempdir(), f"cascade-cache-{os.getuid()}")
    return cache / "cascade"


def used(path: Path) -> None:
    """Note that a file or folder of a cache is in use, by its time of access, which not every disk keeps by itself."""
    with suppress(OSError):  # not there yet, or read-only: then nobody removes it either
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))


def sweep(folder: Path, pattern: str) -> None:
    """Remove the files and folders in ``folder`` that match, and that nobody has used for long."""
    for path in folder.glob(pattern):
        with suppress(FileNotFoundError):  # another process removes it
            if time.time() - max(path.stat().st_atime, path.stat().st_mtime) > UNUSED:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
