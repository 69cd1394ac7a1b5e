"""The folder of everything that can be measured or downloaded again."""

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/cascade`` or ``~/.cache/cascade``; it may not exist yet.

    A user without a home, such as a container's user ID without HOME and passwd entry, gets a temporary folder.
    """
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # neither HOME nor an entry in /etc/passwd
        return Path(tempfile.gettempdir(), f"cascade-cache-{os.getuid()}")
    return cache / "cascade"
