"""Offline prediction: files in, one Parquet file out, one row for each, whatever is wrong with some of them.

A few batches are under way at once, each in a thread: ``Engine.predict`` decodes before it takes its lock, so
one thread decodes while another computes, and at most one full-size picture a thread is in memory.
"""

import glob
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cascade import __version__
from cascade.errors import CascadeError
from cascade.prediction import ItemError, Options, Prediction

if TYPE_CHECKING:
    import pyarrow as pa

    from cascade.engine import Engine

Answer = Prediction | ItemError
Advance = Callable[[int, int], object]
"""Told how many images are done, of how many."""

ROW_GROUP = 4096

# What a folder is searched for. Those in the second line cannot be decoded and become rows with an error,
# lest a folder of GIFs pass for an empty one.
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp"}
    | {".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jp2", ".jxl"}
)


@dataclass(frozen=True)
class Summary:
    """What ``predict_files`` did.

    Attributes:
        bundle, version, mode: what predicted.
        rows: images, which is the rows of the file.
        errors: how many of them have none but an error, by kind.
        clusters: the share of each cluster among the others.
        seconds: from the first image to the file in its place.
    """

    bundle: str
    version: str
    mode: str
    rows: int
    errors: dict[str, int]
    clusters: dict[int, float]
    seconds: float

    @property
    def images_per_second(self) -> float:
        return self.rows / self.seconds


def predict_files(
    engine: "Engine",
    sources: Sequence[Path],
    out: Path,
    options: Options = Options(),
    *,
    batch: int = 64,
    threads: int = 2,
    progress: Advance = lambda done, total: None,
) -> Summary:
    """Predict every image of ``sources`` and write ``out``, which appears only when it is whole.

    Args:
        engine: holds the bundle.
        sources: files, folders (searched to any depth) and patterns; see ``find``.
        out: the Parquet file; one that exists is replaced at the end. Its columns are those of ``_schema``.
        options: for all images. The bundle's version is settled at the start.
        batch: images of a pass.
        threads: batches under way at once.
        progress: told after each batch; ``bar`` makes one.

    Raises:
        CascadeError: no images, an unknown bundle, version or mode, or a file that cannot be written.
    """
    if batch < 1 or threads < 1:
        raise CascadeError(f"batch ({batch}) and threads ({threads}) must be at least 1")
    bundle = engine.find(options.bundle, options.version)
    if isinstance(bundle, ItemError):
        raise CascadeError(bundle.message)
    mode = options.mode or bundle.card.mode
    if mode not in bundle.fusions:
        raise CascadeError(f"{bundle.name}/{bundle.version} has no mode {mode}; it has: {' '.join(bundle.fusions)}")
    options = replace(options, bundle=bundle.name, version=bundle.version, mode=mode)
    schema = _schema(options, bundle.card.dim if options.embedding else None)
    paths = find(sources)
    start = time.perf_counter()
    errors: Counter[str] = Counter()
    clusters: Counter[int] = Counter()
    done = 0
    with _parquet(out, schema) as write, closing(_answers(engine, paths, options, batch, threads)) as answers:
        progress(0, len(paths))
        for chunk in answers:
            write([_row(path, answer) for path, answer in zip(paths[done : done + batch], chunk, strict=True)])
            errors.update(answer.kind for answer in chunk if isinstance(answer, ItemError))
            clusters.update(answer.cluster for answer in chunk if isinstance(answer, Prediction))
            done += len(chunk)
            progress(done, len(paths))
    shares = {k: n / clusters.total() for k, n in sorted(clusters.items())}
    seconds = time.perf_counter() - start
    return Summary(bundle.name, bundle.version, mode, done, dict(errors.most_common()), shares, seconds)


def find(sources: Iterable[str | Path]) -> list[Path]:
    """The files that ``sources`` mean: source by source, sorted within each.

    A file stands for itself, there or not. A folder stands for the images in it, by suffix, to any depth,
    links followed but no folder twice; one that cannot be listed stands for itself. A pattern (``*``, ``?``,
    ``[]``, ``**``) stands for what it matches.

    Raises:
        CascadeError: there are no images in one of them.
    """
    found: list[Path] = []
    for source in sources:
        here = sorted(set(_expand(Path(source))))
        if not here:
            raise CascadeError(f"{source} has no images: name image files, or a folder or pattern that has some")
        found += here
    if not found:
        raise CascadeError("no images were named: give files, folders or patterns such as 'photos/**/*.jpg'")
    return found


@contextmanager
def bar(what: str = "predict") -> Iterator[Advance]:
    """A progress bar on stderr, with rate and time left; gives what to pass as ``progress``."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    start = time.perf_counter()
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as shown:
        task = shown.add_task(what, total=None, rate="")

        def advance(done: int, total: int) -> None:
            rate = done / (time.perf_counter() - start)
            shown.update(task, completed=done, total=total, rate=f"{rate:.1f} images/s")

        yield advance


def _expand(source: Path) -> Iterator[Path]:
    if os.path.isdir(source):
        yield from _images_in(source)
    elif any(c in str(source) for c in "*?[") and not os.path.lexists(source):
        for match in map(Path, glob.iglob(str(source), recursive=True)):
            if os.path.lexists(match):  # "gone/**" matches "gone/" in some Pythons
                yield from _images_in(match) if os.path.isdir(match) else [match]
    else:
        yield source


def _images_in(folder: Path) -> Iterator[Path]:
    unlisted: list[OSError] = []
    seen: set[str] = set()
    for here, folders, files in os.walk(folder, onerror=unlisted.append, followlinks=True):
        folders.sort()  # os.walk goes on in this order: it decides which of two links to a folder counts
        if (real := os.path.realpath(here)) in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(here, name) for name in files if os.path.splitext(name)[1].lower() in SUFFIXES)
    yield from (Path(error.filename) for error in unlisted)


def _answers(
    engine: "Engine", paths: list[Path], options: Options, batch: int, threads: int
) -> Generator[list[Answer], None, None]:
    """The answers batch by batch, in order, at most ``threads`` batches ahead of the one that is given."""
    ahead: deque[Future[list[Answer]]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="cascade-batch")
    try:
        for first in range(0, len(paths), batch):
            ahead.append(pool.submit(engine.predict, paths[first : first + batch], options))
            if len(ahead) > threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _schema(options: Options, dim: int | None) -> "pa.Schema":
    """The columns, in order; an error leaves all but ``path``, ``error`` and ``error_kind`` null."""
    import pyarrow as pa

    label = pa.struct({"name": pa.string(), "score": pa.float32()})
    neighbour = pa.struct({"name": pa.string(), "label": pa.string(), "similarity": pa.float32()})
    columns = {
        "path": pa.string(),
        "bundle": pa.string(),
        "version": pa.string(),
        "mode": pa.string(),
        "cluster": pa.int64(),
        "confidence": pa.float32(),
        "ood": pa.float32(),
        "masks": pa.list_(pa.string()),
        "labels": pa.list_(label),
        "neighbours": pa.list_(neighbour),
        **({"embedding": pa.list_(pa.float32(), dim)} if dim else {}),
        "error": pa.string(),
        "error_kind": pa.string(),
    }
    meta = {
        "bundle": options.bundle,
        "version": options.version,
        "mode": options.mode,
        "cascade": __version__,
    }
    return pa.schema(columns, metadata=meta)


def _row(path: Path, answer: Answer) -> dict[str, Any]:
    row: dict[str, Any] = {"path": _text(str(path))}
    if isinstance(answer, ItemError):
        return row | {"error": _text(answer.message), "error_kind": answer.kind}
    return row | answer.to_json()


def _text(name: str) -> str:
    """A file's name need not be UTF-8 on Linux, a Parquet string must: other bytes become ``\\xff``."""
    return os.fsencode(name).decode(errors="backslashreplace")


@contextmanager
def _parquet(out: Path, schema: "pa.Schema") -> Iterator[Callable[[list[dict[str, Any]]], None]]:
    """Gives what appends rows to a temporary file, which takes ``out``'s place if the block ends well."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from cascade.bundle import sync_folder

    if out.is_dir() or not out.parent.is_dir():
        raise CascadeError(f"{out} cannot be written: name a file in a folder that exists")
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    rows: list[dict[str, Any]] = []

    def append(more: list[dict[str, Any]], least: int = ROW_GROUP) -> None:
        rows.extend(more)
        if len(rows) >= least:
            writer.write_table(pa.Table.from_pylist(rows, schema))
            rows.clear()

    try:
        with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
            yield append
            append([], least=1)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(out)
        sync_folder(out.parent)
    except OSError as e:
        raise CascadeError(f"{out} could not be written ({e}): make room, or name another file") from e
    finally:
        temporary.unlink(missing_ok=True)
