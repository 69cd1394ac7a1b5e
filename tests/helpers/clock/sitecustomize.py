"""The wall clock of a Python program under test: as many seconds from the true one as the file CLOCK says."""

import mmap
import os
import struct
import time

_true = time.time, time.time_ns
with open(os.environ["CLOCK"], "rb") as _file:
    _ahead = mmap.mmap(_file.fileno(), 8, access=mmap.ACCESS_READ)


def _seconds() -> int:
    (seconds,) = struct.unpack("q", _ahead)
    return int(seconds)


time.time = lambda: _true[0]() + _seconds()
time.time_ns = lambda: _true[1]() + _seconds() * 10**9
