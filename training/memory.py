"""Check that something fits into memory before hours are spent on it."""

from pathlib import Path

from cascade.errors import CascadeError

MEMINFO = Path("/proc/meminfo")
LIMITS = tuple(map(Path, ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")))
"""Memory limit of the cgroup, version 2 or 1, as seen in a container."""


def expect(needed: int, what: str) -> None:
    """Compare the bytes needed with those available, or with the container's limit.

    Raises:
        CascadeError: not enough memory is available.
    """
    if needed > (free := available()):
        raise CascadeError(
            f"{what} need {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are available: use fewer images"
        )


def available() -> int:
    """Bytes available without swapping, at most the container's limit."""
    line = next(line for line in MEMINFO.read_text().splitlines() if line.startswith("MemAvailable"))
    limits = [path.read_text().strip() for path in LIMITS if path.exists()]
    return min([1024 * int(line.split()[1]), *(int(limit) for limit in limits if limit.isdecimal())])
