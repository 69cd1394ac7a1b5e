"""Offline prediction: sources in, Parquet out, one row for each image, whatever is wrong with some of them.

Reading, decoding (in a pool), passes and writing go on beside each other, each at most a batch ahead of the next: the
slowest sets the speed, and memory stays what a few batches take. ``table`` does the same for a few images at once, and
needs nothing but an engine: it is what a job on many machines is made of.
"""

import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from cascade import metrics
from cascade.engine.results import ItemError, Options
from cascade.errors import CascadeError
from cascade.model.preprocessing import ImageError
from cascade.offline.files import Held, Load, is_url
from cascade.offline.job import Embedding, Job, extent, join, opened, part_path, parts, parts_folder, todo, writing
from cascade.offline.schema import Answer, count, rows_of, schema
from cascade.offline.sources import ROWS, Unit, read

if TYPE_CHECKING:
    import pyarrow as pa

    from cascade.engine.engine import Engine
    from cascade.engine.forward import Item

T = TypeVar("T")
Advance = Callable[[int, int | None], object]
"""Told how many images are done, of how many (None while nobody knows)."""
Run = Callable[["Engine", Job, Path, int, int, Advance], int]
"""Makes every missing part of a job (engine, job, folder, batch, threads, progress); how many rows that were."""

BATCH = 256
HELD = 256 * 2**20  # bytes of encoded images in a batch, of the sources that can't be read out of order


@dataclass(frozen=True)
class Summary:
    """What a job came to.

    Attributes:
        bundle, version, mode: what predicted.
        rows: images, which is the rows of the output.
        errors: how many of them have none but an error, by kind.
        clusters: the share of each cluster among the others.
        fresh: rows of this run; the others were done before.
        seconds: of this run.
        trained: share of each cluster in training; empty without a router.
        shares: of that time, by what it went to: ``forward``, ``swap``, and ``decode`` as a share of all its threads.
    """

    bundle: str
    version: str
    mode: str
    rows: int
    errors: dict[str, int]
    clusters: dict[int, float]
    fresh: int
    seconds: float
    trained: tuple[float, ...]
    shares: dict[str, float]

    @property
    def images_per_second(self) -> float:
        return self.fresh / self.seconds


def predict_files(
    engine: "Engine",
    sources: Sequence[str | Path],
    out: Path,
    options: Options = Options(),
    *,
    embedding: Embedding = "none",
    batch: int = BATCH,
    threads: int | None = None,
    rows: int = ROWS,
    progress: Advance = lambda done, total: None,
    run: Run | None = None,
) -> Summary:
    """Predict every image of ``sources`` and write a folder of Parquet files, or one.

    Killed at any moment and called again it goes on with what has no part yet (see ``cascade.offline.job``).

    Args:
        engine: holds the bundle.
        sources: see ``cascade.offline.sources.expand``.
        out: a folder, or a file where it ends in ``.parquet``: then the parts lie in ``OUT.parts`` until they are
            joined, and an older file is replaced at the end. Columns are those of ``cascade.offline.schema.schema``.
        options: for all images, their ``embedding`` aside. The bundle's version is settled at the start.
        embedding: how it is stored, if at all.
        batch: images of a pass at most.
        threads: that decode; None for one a core.
        rows: of a part, where the source can be cut there.
        progress: told after each batch; ``bar`` makes one.
        run: who makes the parts; None for this process.

    Raises:
        CascadeError: no images, an unknown bundle, version or mode, other settings than the job was begun with, or
            what cannot be written.
    """
    threads = len(os.sched_getaffinity(0)) if threads is None else threads
    if min(batch, threads, rows) < 1:
        raise CascadeError(f"batch ({batch}), threads ({threads}) and rows ({rows}) must be at least 1")
    job = settle(engine, sources, options, embedding, rows)
    folder = parts_folder(out)
    with opened(folder, job):
        start, before = time.perf_counter(), metrics.stage_seconds()
        fresh = (run or _run)(engine, job, folder, batch, threads, progress)
        seconds = time.perf_counter() - start
        spent = {name: value - before[name] for name, value in metrics.stage_seconds().items()}
        shares = {
            "forward": sum(spent[name] for name in ("dispatch", "expert", "fuse")) / seconds,
            "swap": spent["swap"] / seconds,
            "decode": spent["decode"] / seconds / threads,
        }
        done = count(parts(folder))
        bundle = engine.find(job.bundle, job.version)
        trained = () if isinstance(bundle, ItemError) or not bundle.card.router else tuple(bundle.card.router.shares)
        if folder != out:
            join(folder, out)
    return Summary(job.bundle, job.version, job.mode, *done, fresh, seconds, trained, shares)


def settle(
    engine: "Engine", sources: Sequence[str | Path], options: Options, embedding: Embedding = "none", rows: int = ROWS
) -> Job:
    """The job that is meant, with everything in it that was left open.

    Raises:
        CascadeError: an unknown bundle, version or mode.
    """
    from cascade.bundle.format import digest

    bundle = engine.find(options.bundle, options.version)
    if isinstance(bundle, ItemError):
        raise CascadeError(bundle.message)
    mode = options.mode or bundle.card.mode
    if mode not in bundle.fusions:
        raise CascadeError(f"{bundle.name}/{bundle.version} has no mode {mode}; it has: {' '.join(bundle.fusions)}")
    names = tuple(map(str, sources))
    relative = any(not is_url(name) and (not os.path.isabs(name) or name.endswith(".txt")) for name in names)
    return Job(
        sources=names,
        folder=os.getcwd() if relative else "",
        bundle=bundle.name,
        version=bundle.version,
        digest=digest(bundle),
        mode=mode,
        dim=bundle.card.dim,
        embedding=embedding,
        labels=options.labels,
        neighbors=options.neighbors,
        rows=rows,
    )


def table(engine: "Engine", job: Job, images: Iterable[tuple[str, Load]]) -> "pa.Table":
    """The rows of a few images, see ``schema``, in their order: load, decode, one pass, no thread of its own.

    Args:
        engine: holds the job's bundle.
        images: key and what loads the bytes, as ``cascade.offline.sources.read`` gives them.
    """
    keys, loads = zip(*images, strict=True) if (images := list(images)) else ((), ())
    return rows_of(job, keys, answer(engine, [prepare(engine, job, load) for load in loads]))


def prepare(engine: "Engine", job: Job, load: Load) -> "Item | ItemError":
    """Load and decode one image, in any thread."""
    with metrics.stage("decode"):
        try:
            data = load()
        except ImageError as error:
            metrics.count(job.bundle, None, error.kind)
            return ItemError(error.kind, str(error))
        return engine.prepare(data, _options(job))


def answer(engine: "Engine", prepared: Sequence["Item | ItemError"]) -> list[Answer]:
    """One pass for all that could be decoded, grouped by mask; answers in the order of ``prepared``."""
    items = [item for item in prepared if not isinstance(item, ItemError)]
    answers = iter(engine.run(items) if items else ())
    return [item if isinstance(item, ItemError) else next(answers) for item in prepared]


@contextmanager
def bar(what: str = "predict") -> Iterator[Advance]:
    """A progress bar on stderr, with rate and time left; gives what to pass as ``progress``."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    start, before = time.perf_counter(), -1
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as shown:
        task = shown.add_task(what, total=None, rate="")

        def advance(done: int, total: int | None) -> None:
            nonlocal before
            if before < 0:
                before = done
                shown.reset(task, completed=done, total=total, rate="")  # what was done before says nothing of the rate
                return
            rate = (done - before) / (time.perf_counter() - start)
            shown.update(task, completed=done, total=total, rate=f"{rate:.1f} images/s")

        yield advance


def make_part(engine: "Engine", job: Job, unit: Unit, path: Path, batch: int = BATCH, threads: int = 1) -> int:
    """The part of one unit as a Parquet file at ``path``; how many rows it has."""
    rows = 0
    with (
        closing(_answers(engine, job, [(0, unit)], batch, threads)) as answers,
        writing(path, schema(job)) as write,
    ):
        for _, keys, found in answers:
            write(rows_of(job, keys, found))
            rows += len(keys)
    return rows


def _run(engine: "Engine", job: Job, folder: Path, batch: int, threads: int, progress: Advance) -> int:
    done, total = extent(folder)
    fresh = 0
    progress(done, total)
    with closing(_answers(engine, job, todo(folder), batch, threads)) as answers:
        for number, group in groupby(answers, key=lambda each: each[0]):
            with writing(part_path(folder, number), schema(job)) as write:
                for _, keys, found in group:
                    write(rows_of(job, keys, found))
                    fresh += len(keys)
                    progress(done + fresh, total)
    return fresh


def _answers(
    engine: "Engine", job: Job, units: Iterable[tuple[int, Unit]], batch: int, threads: int
) -> Generator[tuple[int, list[str], list[Answer]], None, None]:
    """Number of the unit, keys and answers, batch by batch, in order; each unit ends a batch, an empty one too."""
    with ThreadPoolExecutor(threads, "cascade-batch-decode") as pool:
        try:
            with closing(_ahead(_batches(engine, job, units, batch, pool), "cascade-batch-read")) as batches:
                passes = _passes(engine, batches)
                with closing(_ahead(passes, "cascade-batch-pass")) as answers:
                    yield from answers
        finally:
            pool.shutdown(cancel_futures=True)


def _batches(
    engine: "Engine", job: Job, units: Iterable[tuple[int, Unit]], batch: int, pool: ThreadPoolExecutor
) -> Generator[tuple[int, list[str], list["Future[Item | ItemError]"]], None, None]:
    """The images batch by batch, on their way through the decoding threads."""
    for number, unit in units:
        keys: list[str] = []
        futures: list[Future[Item | ItemError]] = []
        held = 0
        for key, load in read(unit, engine.limits):
            if len(keys) == batch or held > HELD:
                yield number, keys, futures
                keys, futures, held = [], [], 0
            keys.append(key)
            futures.append(pool.submit(prepare, engine, job, load))
            held += len(load.data) if isinstance(load, Held) else 0
        yield number, keys, futures


def _passes(
    engine: "Engine", batches: Iterable[tuple[int, list[str], list["Future[Item | ItemError]"]]]
) -> Generator[tuple[int, list[str], list[Answer]], None, None]:
    for number, keys, futures in batches:
        yield number, keys, answer(engine, [future.result() for future in futures])


def _ahead(items: Generator[T, None, None], name: str) -> Generator[T, None, None]:
    """The items, the next of which is made in a thread while the one before it is used."""
    with ThreadPoolExecutor(1, name) as pool:
        try:
            coming = pool.submit(next, items, None)
            while (item := coming.result()) is not None:
                coming = pool.submit(next, items, None)
                yield item
        finally:
            pool.shutdown(cancel_futures=True)
            items.close()


def _options(job: Job) -> Options:
    return Options(job.bundle, job.version, job.mode, job.embedding != "none", job.labels, job.neighbors)
