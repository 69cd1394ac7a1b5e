"""The cache folder, for everything that can be measured or downloaded again, and eviction of unused parts."""

import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

UNUSED = 30 * 24 * 3600.0
"""Seconds after which unused parts are removed."""


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/cascade`` or ``~/.cache/cascade``; it may not exist yet.

    A user without a home, such as a container's user ID without HOME or a passwd entry, gets a temporary folder.
    """
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # neither HOME nor an entry in /etc/passwd
        return Path(tempfile.gettempdir(), f"cascade-cache-{os.getuid()}")
    return cache / "cascade"


def used(path: Path) -> None:
    """Mark a file or folder of a cache as used, by its access time, which not every file system updates by itself."""
    with suppress(OSError):  # missing, or read-only: then nobody removes it either
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))


def sweep(folder: Path, pattern: str) -> None:
    """Remove the matching files and folders in ``folder`` that have not been used for a long time."""
    for path in folder.glob(pattern):
        with suppress(FileNotFoundError):  # another process is removing it
            if time.time() - max(path.stat().st_atime, path.stat().st_mtime) > UNUSED:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
