"""Return memory to the operating system after large images."""

import ctypes
import os
import resource

GROWN = 64 * 2**20
"""Bytes by which a process may grow before it trims its heap. A pass needs less."""


class Heap:
    """Trims the heap, because after large images the allocator would keep hundreds of MB."""

    def __init__(self) -> None:
        self._before = 0
        # Opened now, because connections may use up all descriptors later.
        self._statm = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)

    def give_back(self) -> None:
        """Return free memory to the kernel if the process has grown by GROWN; costs nothing otherwise."""
        if self._bytes() > self._before + GROWN:
            ctypes.CDLL(None).malloc_trim(0)
            self._before = self._bytes()

    def _bytes(self) -> int:
        return _resident(os.pread(self._statm, 200, 0))


def resident() -> int:
    """Resident bytes of this process (RSS)."""
    with open("/proc/self/statm", "rb") as statm:
        return _resident(statm.read())


def _resident(statm: bytes) -> int:
    return int(statm.split()[1]) * resource.getpagesize()
