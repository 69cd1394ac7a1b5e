"""Room on the disk for the metrics of a process that shares them with others through a folder."""

import os
from pathlib import Path

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
ROOM = 2**20  # bytes of each of a process's files from the start: thousands of series


def reserve(folder: Path) -> str | None:
    """Make this process's files in the multiprocess folder, with their disk blocks; or say why there is no room.

    prometheus_client maps them into memory, and would begin them as holes: with the disk full, the first write into a
    hole kills the process.
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
        return f"no room for metrics in {folder} ({error.strerror}): make some, then start again; served without them"
    return None


TROUBLE = reserve(Path(os.environ[FOLDER])) if os.environ.get(FOLDER) else None
"""Why nobody sees the metrics of this process: it counts for itself alone."""
if TROUBLE:
    del os.environ[FOLDER]
