"""Cached arrays: computed once, row by row, then memory-mapped from disk."""

import fcntl
import io
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from cascade.cache import sweep, used


def stored(
    file: Path, shape: tuple[int, ...], dtype: np.dtype, rows: Callable[[int], Iterable[np.ndarray]]
) -> np.ndarray:
    """Map the array in the .npy ``file``, and compute it first if it is missing; evict arrays unused for a long time.

    The file is written atomically; an interrupted run leaves a partial file that the next one resumes. If several
    processes need it at the same time, one computes it and the others wait.

    Args:
        rows: called with the number of finished rows, yields the remaining ones in order.
    """
    used(file)
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        for unused in ("*.npy", "*.part"):
            sweep(file.parent, unused)
        head = io.BytesIO()
        fields = {"descr": dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(head, fields)
        header, row = head.getvalue(), dtype.itemsize * math.prod(shape[1:])
        part = file.with_suffix(".part")
        with open(part, "ab") as out:  # rows in order after the header: the length tells the progress
            fcntl.flock(out, fcntl.LOCK_EX)
            if file.exists():  # another process has written it in the meantime
                part.unlink(missing_ok=True)
                return stored(file, shape, dtype, rows)
            done = max(0, (out.seek(0, os.SEEK_END) - len(header)) // row)
            out.truncate(len(header) + done * row if done else 0)
            if not done:
                out.write(header)
            for one in rows(done):
                out.write(one.tobytes())
            out.flush()
            os.fsync(out.fileno())
            part.replace(file)  # before the lock is released, or a waiting process would find neither file
    return np.load(file, mmap_mode="r", allow_pickle=False)
