"""Memory of a process that decodes images by strangers."""

import ctypes
import resource
from pathlib import Path

GROWN = 64 * 2**20
"""Bytes by which a process may have grown before it looks for what it can give back."""


class Resident:
    """Large images leave the allocator with hundreds of MB that it would keep; what a pass needs stays below GROWN."""

    def __init__(self) -> None:
        self._before = 0

    def give_back(self) -> None:
        """Give what is free to the kernel where the process has grown much; else it costs nothing."""
        if resident() > self._before + GROWN:
            ctypes.CDLL(None).malloc_trim(0)
            self._before = resident()


def resident() -> int:
    """Bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
