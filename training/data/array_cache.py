"""Arrays that are made once, row by row, and mapped from disk ever after."""

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
    """The array in the .npy ``file``, which is made first if it is not there; others that are unused for long go.

    By that name it is complete or not there; an interrupted start leaves a part that the next one continues. Of several
    processes that want it at a time one makes it, the others wait.

    Args:
        rows: given how many rows are done, the rest of them in order.
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
        with open(part, "ab") as out:  # rows in order behind the header: the length says how far it got
            fcntl.flock(out, fcntl.LOCK_EX)
            if file.exists():  # somebody else's, in the meantime
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
            part.replace(file)  # before the lock goes, or who waited for it would find neither
    return np.load(file, mmap_mode="r", allow_pickle=False)
