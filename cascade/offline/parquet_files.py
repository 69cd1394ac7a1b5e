"""Images in Parquet files, read row group by row group in a child process.

Arrow's native reader can abort the whole process on a damaged file. In a child (``cascade.offline.parquet_child``), an
abort only costs the rest of one file, whose rows become errors.
"""

import contextlib
import json
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from cascade.errors import CascadeError
from cascade.model.decoding import LIMITS
from cascade.offline.files import Held, Load, failing

GROUP = 2 * 2**30  # bytes of images in a row group
ROWS_PER_BYTE = 64  # of the file; more can only be empty or damaged
LENGTH = struct.Struct("<q")  # of a row that the child sends


def cut_parquet(where: str, rows: int) -> Iterator[tuple[int, int, int, int]]:
    """Split a Parquet file into pieces of consecutive row groups with at least ``rows`` rows.

    Yields:
        The first row group, the one after the last, the number of the first row, and the number of rows.

    Raises:
        CascadeError: the file cannot be read, does not have exactly one column of images, or its footer is implausible.
    """
    if (groups := _row_groups(where)) is None:
        yield 0, 0, 0, 1  # reading it fails again, and gives the error's row
        return
    start = row = count = 0
    for group, (group_rows, _) in enumerate(groups):
        count += group_rows
        if count and (count >= rows or group == len(groups) - 1):
            yield start, group + 1, row, count
            start, row, count = group + 1, row + count, 0


def read_parquet(where: str, start: int, stop: int, row: int, count: int) -> Iterator[tuple[str, Load]]:
    """Yield the images of a piece from ``cut_parquet``; rows that cannot be read fail when they are loaded."""
    end = row + count
    with _child("read", where, start, stop, LIMITS.max_bytes + 1) as (process, errors):
        assert process.stdout is not None
        while row < end and len(head := process.stdout.read(LENGTH.size)) == LENGTH.size:
            (length,) = LENGTH.unpack(head)
            data = process.stdout.read(length)
            if len(data) < length:
                break
            yield f"{where}#{row}", Held(data)
            row += 1
        why = (
            f"{where} cannot be read after row {row} ({_reason(process, errors)}): write it again" if row < end else ""
        )
    for lost in range(row, end):  # a row for each in the output
        yield f"{where}#{lost}", failing(why)


def read_rows(where: str, rows: set[int]) -> Iterator[tuple[str, Load]]:
    """Yield the images of those row groups that hold some of ``rows``."""
    first = 0
    for group, (count, _) in enumerate(_row_groups(where) or ()):
        if any(first <= row < first + count for row in rows):
            yield from read_parquet(where, group, group + 1, first, count)
        first += count


def _row_groups(where: str) -> list[tuple[int, int]] | None:
    """Rows and uncompressed bytes of images of each row group, checked against the size of the file.

    None if the reader was aborted.
    """
    with _child("groups", where) as (process, errors):
        assert process.stdout is not None
        output = process.stdout.read()
        if (code := process.wait()) < 0:
            return None
        if code:
            message = f"{where} cannot be read as Parquet ({_reason(process, errors)}): write it again, or omit it"
            raise CascadeError(message)
    answer: dict[str, Any] = json.loads(output)
    if "error" in answer:
        raise CascadeError(f"{where} {answer['error']}")
    groups = [(int(rows), int(size)) for rows, size in answer["groups"]]
    for group, (rows, size) in enumerate(groups):
        if size > GROUP:
            raise CascadeError(f"{where}: row group {group} has {size} bytes of images; write it with smaller ones")
        if not 0 <= rows <= ROWS_PER_BYTE * answer["bytes"]:
            raise CascadeError(
                f"{where}: row group {group} claims {rows} rows: it is damaged; write it again, or omit it"
            )
    return groups


@contextmanager
def _child(*arguments: object) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """Run the child process and yield it with its stderr; it has ended when the block ends."""
    root = str(Path(__file__).parents[2])
    search = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    # -P: a module in the working folder must not shadow one of ours.
    command = [sys.executable, "-P", "-m", "cascade.offline.parquet_child", *map(str, arguments)]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors,
            env=os.environ | {"PYTHONPATH": search},
        )  # fmt: skip
        try:
            yield process, errors
        finally:
            process.kill()
            process.wait()
            assert process.stdout is not None
            with contextlib.suppress(OSError):
                process.stdout.close()


def _reason(process: subprocess.Popen[bytes], errors: IO[bytes]) -> str:
    """Why the child ended: the last line that it printed, or the signal."""
    code = process.wait()
    if code < 0:
        return f"its reader was stopped by signal {-code}"
    errors.seek(0)
    lines = errors.read().decode(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else "it has fewer rows than its footer says"
