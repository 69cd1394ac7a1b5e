"""Preallocate the Prometheus multiprocess files of a process, so that a full disk cannot kill it later."""

import os
from pathlib import Path

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
ROOM = 2**20  # bytes preallocated for each file: thousands of series


def reserve(folder: Path) -> str | None:
    """Create this process's files in the multiprocess folder and allocate their disk blocks.

    prometheus_client maps them into memory as sparse files: if the disk is full, the first write to a hole kills the
    process (SIGBUS).

    Returns:
        Why there is no disk space, or None.
    """
    kinds = ("counter", "histogram", "gauge_livesum", "gauge_livemax")
    files = [folder / f"{kind}_{os.getpid()}.db" for kind in kinds]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            with file.open("ab") as opened:
                os.posix_fallocate(opened.fileno(), 0, ROOM)
    except OSError as error:
        for file in files:
            file.unlink(missing_ok=True)
        return f"no room for metrics in {folder} ({error.strerror}): free space and restart; serving without them"
    return None


TROUBLE = reserve(Path(os.environ[FOLDER])) if os.environ.get(FOLDER) else None
"""Why this process's metrics are not shared, or None."""
if TROUBLE:
    del os.environ[FOLDER]
