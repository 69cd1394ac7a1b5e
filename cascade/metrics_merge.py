"""Bound the Prometheus multiprocess folder: one counter and one histogram file for all processes that have died."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prometheus_client.mmap_dict import MmapedDict

ENTRY = 40  # bytes that a value takes beside its key, at most


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Only one scrape at a time may read the folder or merge its files, of all threads and processes."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def alive(file: Path) -> bool:
    """Whether the process that writes this file lives; 0, the number of merged files, is no process."""
    return Path("/proc", file.stem.rpartition("_")[2]).exists()


def merge_dead(folder: Path) -> None:
    """Add the files of dead processes up in ``<kind>_0.db`` and remove them; without room for that they stay."""
    for kind in ("counter", "histogram"):
        merged = folder / f"{kind}_0.db"
        dead = [file for file in folder.glob(f"{kind}_*.db") if not alive(file)]
        if dead in ([], [merged]):
            continue
        values: dict[str, float] = {}
        for file in dead:
            if file.stat().st_size:  # else it died before it wrote anything
                for key, value, _, _ in MmapedDict.read_all_values_from_file(str(file)):
                    values[key] = values.get(key, 0.0) + value
        with suppress(OSError):  # no room: the next scrape tries again
            _write(values, folder / f"{kind}_0.new")
            (folder / f"{kind}_0.new").rename(merged)  # killed here, one process's counts would be counted twice
            for file in dead:
                if file != merged:
                    file.unlink()


def _write(values: dict[str, float], path: Path) -> None:
    """Preallocated, since a hole in a mapped file kills who writes to it while the disk is full."""
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 2**12 + sum(len(key.encode()) + ENTRY for key in values))
    written = MmapedDict(str(path))
    for key, value in values.items():
        written.write_value(key, value, 0.0)
    written.close()
