"""Bound the Prometheus multiprocess folder: one counter file and one histogram file for all dead processes."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prometheus_client.mmap_dict import MmapedDict

ENTRY = 40  # most bytes of an entry besides its key


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock the folder against all threads and processes, so that one scrape at a time reads and merges its files."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def alive(file: Path) -> bool:
    """Whether the process that writes this file is alive; 0, the number of merged files, is not a process."""
    return Path("/proc", file.stem.rpartition("_")[2]).exists()


def merge_dead(folder: Path) -> None:
    """Merge the files of dead processes into ``<kind>_0.db`` and remove them; if the disk is full they stay."""
    for kind in ("counter", "histogram"):
        merged = folder / f"{kind}_0.db"
        dead = [file for file in folder.glob(f"{kind}_*.db") if not alive(file)]
        if dead in ([], [merged]):
            continue
        values: dict[str, float] = {}
        for file in dead:
            if file.stat().st_size:  # otherwise the process died before it wrote anything
                for key, value, _, _ in MmapedDict.read_all_values_from_file(str(file)):
                    values[key] = values.get(key, 0.0) + value
        with suppress(OSError):  # disk full: the next scrape retries
            _write(values, folder / f"{kind}_0.new")
            (folder / f"{kind}_0.new").rename(merged)  # if killed here, one process's counts are counted twice
            for file in dead:
                if file != merged:
                    file.unlink()


def _write(values: dict[str, float], path: Path) -> None:
    """Write values to a preallocated file: a write to a hole in a mapped file kills the process if the disk is full."""
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 2**12 + sum(len(key.encode()) + ENTRY for key in values))
    written = MmapedDict(str(path))
    for key, value in values.items():
        written.write_value(key, value, 0.0)
    written.close()
