"""The folder of an offline job: its settings, its units of work, and a Parquet file for each finished unit.

    _job.json            the settings; a run with others is refused
    _units.jsonl         the plan: line n is unit n, see ``cascade.offline.sources.Unit``
    part-00000.parquet   the rows of unit 0; written atomically when it is done

Parquet readers ignore names that begin with an underscore. The job can be killed at any time: it resumes with the units
that have no part yet. Parts can be made in any order and by any process.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cascade import atomic
from cascade.errors import CascadeError
from cascade.offline.sources import Unit, plan

if TYPE_CHECKING:
    import pyarrow as pa

JOB, UNITS = "_job.json", "_units.jsonl"
ROW_GROUP = 4096
Embedding = Literal["none", "float16", "float32"]


@dataclass(frozen=True)
class Job:
    """The settings that determine the rows.

    Attributes:
        sources: as ``cascade.offline.sources.plan`` takes them.
        folder: base of relative sources; empty if all are absolute.
        bundle, version, digest: the digest is ``cascade.bundle.format.digest``. The bundle ``auto`` dispatches each
            image; it has no version, and the digest is over all bundles.
        mode: the resolved mode; empty if each bundle uses its own.
        dim: of the embedding.
        embedding: how embeddings are stored, if at all.
        labels, neighbors: maximum numbers.
        rows: maximum rows of a part, if the source can be split.
    """

    sources: tuple[str, ...]
    folder: str
    bundle: str
    version: str
    digest: str
    mode: str
    dim: int
    embedding: Embedding
    labels: int
    neighbors: int
    rows: int
    format: int = 1


def parts_folder(out: Path) -> Path:
    """The folder of a job's parts.

    Raises:
        CascadeError: ``out`` cannot be written.
    """
    single = out.suffix == ".parquet"
    if (single and out.is_dir()) or (not single and out.is_file()) or not out.parent.is_dir():
        raise CascadeError(f"{out} cannot be written: name a folder, or a .parquet file, in a folder that exists")
    return out.with_name(f"{out.name}.parts") if single else out


@contextmanager
def opened(folder: Path, job: Job) -> Iterator[None]:
    """Begin or resume the job in its folder, which is locked until the block ends.

    Raises:
        CascadeError: the folder holds another job, a job is running there, sources have no images, or the disk is full.
    """
    try:
        folder.mkdir(exist_ok=True)
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise CascadeError(
            f"{folder} cannot be written ({error.strerror}): name a folder, or a .parquet file, in one that exists"
        ) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CascadeError(f"{folder} is being written by another process: wait for it, or name another") from None
        _begin(folder, job)
        yield
    finally:
        os.close(lock)


def units(folder: Path) -> Iterator[tuple[int, Unit]]:
    """Every unit of a job, with the number of its part."""
    with (folder / UNITS).open() as lines:
        for number, line in enumerate(lines):
            yield number, Unit.from_json(line)


def todo(folder: Path) -> Iterator[tuple[int, Unit]]:
    """The units without a part."""
    return ((number, unit) for number, unit in units(folder) if not part_path(folder, number).exists())


def part_path(folder: Path, number: int) -> Path:
    """Where the part with this number is, whether it exists or not."""
    return folder / f"part-{number:05d}.parquet"


def parts(folder: Path) -> Iterator[Path]:
    """The parts that exist, in order."""
    return (path for number, _ in units(folder) if (path := part_path(folder, number)).exists())


def files_of(out: Path) -> list[Path]:
    """The Parquet files of a finished job."""
    return sorted(out.glob("part-*.parquet")) if out.is_dir() else [out]


def extent(folder: Path) -> tuple[int, int | None]:
    """Number of finished images, and of all images, or None while that is unknown."""
    import pyarrow.parquet as pq

    done, total, known = 0, 0, True
    for number, unit in units(folder):
        if (path := part_path(folder, number)).exists():
            rows = pq.read_metadata(path).num_rows
            done, total = done + rows, total + rows
        else:
            total, known = total + (unit.count or 0), known and unit.count is not None
    return done, total if known else None


@contextmanager
def writing(path: Path, schema: "pa.Schema") -> Iterator[Callable[["pa.Table"], None]]:
    """Yield a function that appends tables to a Parquet file, which is written atomically when the block ends.

    Raises:
        CascadeError: the file cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    waiting: list[pa.Table] = []

    def append(table: "pa.Table", least: int = ROW_GROUP) -> None:
        waiting.append(table)
        if sum(rows.num_rows for rows in waiting) >= least:
            writer.write_table(pa.concat_tables(waiting))
            waiting.clear()

    try:
        with atomic.file(path) as beside, pq.ParquetWriter(beside, schema, compression="zstd") as writer:
            yield append
            append(schema.empty_table(), least=1)
    except OSError as error:
        raise atomic.not_written(path, error) from error


def join(folder: Path, out: Path) -> None:
    """Join all parts to one file, in the order of the sources, and delete the folder."""
    import pyarrow.parquet as pq

    files = list(parts(folder))
    with writing(out, pq.read_schema(files[0])) as append:
        for path in files:
            with pq.ParquetFile(path) as part:
                for group in range(part.num_row_groups):
                    append(part.read_row_group(group))
    shutil.rmtree(folder)


def _begin(folder: Path, job: Job) -> None:
    for left in folder.glob(".*.tmp"):  # of a killed process, as this one holds the lock
        left.unlink()
    try:
        begun = json.loads((folder / JOB).read_text())
    except FileNotFoundError:
        if others := sorted(path.name for path in folder.iterdir() if path.name != UNITS):
            raise CascadeError(f"{folder} holds {others[0]} but no job: name an empty folder") from None
        try:
            atomic.write_text(folder / UNITS, (f"{unit.to_json()}\n" for unit in plan(job.sources, job.rows)))
        except CascadeError:
            with suppress(OSError):
                folder.rmdir()
            raise
        atomic.write_text(folder / JOB, [json.dumps(asdict(job), indent=1) + "\n"])
        return
    except (OSError, ValueError) as error:
        raise CascadeError(f"{folder / JOB} can't be read ({error}): name another folder") from error
    wanted = json.loads(json.dumps(asdict(job)))
    if differing := [name for name in wanted if begun.get(name) != wanted[name]]:
        name = differing[0]
        raise CascadeError(
            f"{folder} was begun with {name} {_short(begun.get(name))}, not {_short(wanted[name])}: give the same"
            " options, or name another folder"
        )


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
