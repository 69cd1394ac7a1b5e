"""Offline prediction: sources in, Parquet out, one row per image, also for images that cannot be predicted.

Reading, decoding (in a pool), forward passes and writing are a pipeline, in which each step is at most one batch ahead
of the next. Memory is bounded by a few batches. ``table`` does the same for a few images at once.
"""

import hashlib
import os
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from cascade import metrics
from cascade.cpus import cpu_count
from cascade.engine.results import AUTO, ItemError, Options
from cascade.errors import CascadeError
from cascade.model.decoding import ImageError
from cascade.offline.files import Held, Load, is_url
from cascade.offline.job import Embedding, Job, extent, join, opened, part_path, parts, parts_folder, todo, writing
from cascade.offline.schema import Answer, bundle_shares, count, deferred_share, rows_of, schema
from cascade.offline.sources import ROWS, Unit, read
from cascade.progress import Advance

if TYPE_CHECKING:
    import pyarrow as pa

    from cascade.engine.engine import Engine
    from cascade.engine.items import AnyItem

T = TypeVar("T")


@dataclass(frozen=True)
class Work:
    """The work done by one run of a job.

    Attributes:
        rows: number of rows written.
        stages: seconds in each stage of ``cascade.metrics``, summed over engines and threads.
        engines: engines that worked at the same time.
    """

    rows: int
    stages: dict[str, float]
    engines: int = 1


Run = Callable[["Engine", Job, Path, int, int, Advance], Work]
"""Makes every missing part of a job: engine, job, folder, batch, threads, progress."""

BATCH = 256
HELD = 256 * 2**20  # bytes of encoded images in a batch, from sources that must be read in order


@dataclass(frozen=True)
class Summary:
    """The result of a job.

    Attributes:
        bundle, version, mode: what predicted.
        rows: images, one row each.
        errors: number of images with an error, by kind.
        clusters: share of each cluster among the other images.
        fresh: rows written by this run; earlier runs wrote the others.
        seconds: of this run.
        trained: share of each cluster in training; empty without a router.
        deferred: share of the other images that were deferred to a larger input size; None in other modes.
        bundles: share of each bundle among the other images, largest first.
        shares: of that time, by stage: ``forward``, ``swap``, and ``decode`` as a share of all decoding threads.
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
    deferred: float | None = None
    bundles: dict[str, float] = field(default_factory=dict)

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
    """Predict every image of ``sources`` and write a folder of Parquet files, or one file.

    An interrupted job resumes with the units that have no part yet (see ``cascade.offline.job``).

    Args:
        engine: holds the bundle; or for ``auto`` all of them, and each image is dispatched to one.
        sources: see ``cascade.offline.sources.expand``.
        out: a folder; or a file that ends in ``.parquet``, whose parts are in ``OUT.parts`` until they are joined. An
            older file is replaced at the end. Columns are those of ``cascade.offline.schema.schema``.
        options: for all images, except ``embedding``. The bundle's version is resolved at the start.
        embedding: how embeddings are stored, if at all.
        batch: maximum number of images in a pass.
        threads: decoding threads; None for one per core.
        rows: rows of a part, if the source can be split.
        progress: called after each batch, see ``cascade.progress``.
        run: makes the parts; None for this process.

    Raises:
        CascadeError: no images, an unknown bundle, version or mode, settings that differ from those of the
            interrupted job, or an output that cannot be written.
    """
    threads = cpu_count() if threads is None else threads
    if min(batch, threads, rows) < 1:
        raise CascadeError(f"batch ({batch}), threads ({threads}) and rows ({rows}) must be at least 1")
    job = settle(engine, sources, options, embedding, rows)
    folder = parts_folder(out)
    with opened(folder, job):
        start = time.perf_counter()
        work = (run or _run)(engine, job, folder, batch, threads, progress)
        seconds = time.perf_counter() - start
        stages, available = work.stages, seconds * work.engines
        shares = {
            "forward": sum(stages[name] for name in ("dispatch", "expert", "fuse")) / available,
            "swap": stages["swap"] / available,
            "decode": stages["decode"] / available / threads,
        }
        done, deferred = count(parts(folder)), deferred_share(parts(folder))
        bundles = bundle_shares(parts(folder))
        bundle = engine.find(job.bundle, job.version)
        trained = () if isinstance(bundle, ItemError) or not bundle.card.router else tuple(bundle.card.router.shares)
        if folder != out:
            join(folder, out)
    return Summary(job.bundle, job.version, job.mode, *done, work.rows, seconds, trained, shares, deferred, bundles)


def settle(
    engine: "Engine", sources: Sequence[str | Path], options: Options, embedding: Embedding = "none", rows: int = ROWS
) -> Job:
    """Make a job, with mode and version resolved.

    Raises:
        CascadeError: an unknown bundle, version or mode; for ``auto``, no bundle to dispatch to, or embeddings of
            different widths.
    """
    from cascade.bundle.format import digest
    from cascade.engine.deferral import modes_of

    if options.bundle == AUTO:
        name, version, mode = AUTO, "", options.mode or ""
        identity, dim = _dispatching(engine, embedding)
    else:
        bundle = engine.find(options.bundle, options.version)
        if isinstance(bundle, ItemError):
            raise CascadeError(bundle.message)
        modes = modes_of(bundle)
        mode = options.mode or modes[0]
        if mode not in modes:
            raise CascadeError(f"{bundle.name}/{bundle.version} has no mode {mode}; it has: {' '.join(modes)}")
        (name, version), identity, dim = bundle.identity, digest(bundle), bundle.card.dim
    names = tuple(map(str, sources))
    relative = any(not is_url(name) and (not os.path.isabs(name) or name.endswith(".txt")) for name in names)
    return Job(
        sources=names,
        folder=os.getcwd() if relative else "",
        bundle=name,
        version=version,
        digest=identity,
        mode=mode,
        dim=dim,
        embedding=embedding,
        labels=options.labels,
        neighbors=options.neighbors,
        rows=rows,
    )


def _dispatching(engine: "Engine", embedding: Embedding) -> tuple[str, int]:
    """The digest over all bundles that images may be dispatched to, and the width of their embeddings."""
    found = engine.dispatch_table()
    if isinstance(found, ItemError):
        raise CascadeError(found.message)
    loaded = [target.bundle for _, target in found.columns if target.bundle is not None]
    bundles = sorted((bundle.name, bundle.version, bundle.digest) for bundle in loaded)
    widths = {bundle.card.dim for bundle in loaded}
    if embedding != "none" and len(widths) > 1:
        raise CascadeError(f"the bundles have embeddings of {len(widths)} widths: add --embedding none")
    return hashlib.sha256(repr(bundles).encode()).hexdigest(), min(widths)


def table(engine: "Engine", job: Job, images: Iterable[tuple[str, Load]]) -> "pa.Table":
    """Predict a few images in the calling thread: load, decode, one pass. Rows come in order, see ``schema``.

    Args:
        engine: holds the job's bundle.
        images: keys and Loads, as ``cascade.offline.sources.read`` yields them.
    """
    keys, loads = zip(*images, strict=True) if (images := list(images)) else ((), ())
    return rows_of(job, keys, answer(engine, [prepare(engine, job, load) for load in loads]))


def prepare(engine: "Engine", job: Job, load: Load) -> "AnyItem | ItemError":
    """Load and decode one image, in any thread."""
    with metrics.stage("decode"):
        try:
            data = load()
        except ImageError as error:
            metrics.count_answer(job.bundle, None, error.kind)
            return ItemError(error.kind, str(error))
        return engine.prepare(data, _options(job))


def answer(engine: "Engine", prepared: Sequence["AnyItem | ItemError"]) -> list[Answer]:
    """Run one pass over all decoded images, grouped by mask; answers come in the order of ``prepared``."""
    items = [item for item in prepared if not isinstance(item, ItemError)]
    answers = iter(engine.run(items) if items else ())
    return [item if isinstance(item, ItemError) else next(answers) for item in prepared]


def make_part(engine: "Engine", job: Job, unit: Unit, path: Path, batch: int = BATCH, threads: int = 1) -> int:
    """Write the part of one unit to a Parquet file; returns its number of rows."""
    rows = 0
    with (
        closing(_answers(engine, job, [(0, unit)], batch, threads)) as answers,
        writing(path, schema(job)) as write,
    ):
        for _, keys, found in answers:
            write(rows_of(job, keys, found))
            rows += len(keys)
    return rows


def stages_since(before: dict[str, float]) -> dict[str, float]:
    """Seconds in each stage since ``before``, an earlier ``metrics.stage_seconds()``."""
    return {name: seconds - before[name] for name, seconds in metrics.stage_seconds().items()}


def _run(engine: "Engine", job: Job, folder: Path, batch: int, threads: int, progress: Advance) -> Work:
    done, total = extent(folder)
    fresh, before = 0, metrics.stage_seconds()
    progress(done, total)
    with closing(_answers(engine, job, todo(folder), batch, threads)) as answers:
        for number, group in groupby(answers, key=lambda each: each[0]):
            with writing(part_path(folder, number), schema(job)) as write:
                for _, keys, found in group:
                    write(rows_of(job, keys, found))
                    fresh += len(keys)
                    progress(done + fresh, total)
    return Work(fresh, stages_since(before))


def _answers(
    engine: "Engine", job: Job, units: Iterable[tuple[int, Unit]], batch: int, threads: int
) -> Generator[tuple[int, list[str], list[Answer]], None, None]:
    """Number of the unit, keys and answers, batch by batch, in order. No batch spans two units."""
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
) -> Generator[tuple[int, list[str], list["Future[AnyItem | ItemError]"]], None, None]:
    """Yield the images in batches, submitted to the decoding threads."""
    for number, unit in units:
        keys: list[str] = []
        futures: list[Future[AnyItem | ItemError]] = []
        pending_bytes = 0
        for key, load in read(unit, engine.limits):
            if len(keys) == batch or pending_bytes > HELD:
                yield number, keys, futures
                keys, futures, pending_bytes = [], [], 0
            keys.append(key)
            futures.append(pool.submit(prepare, engine, job, load))
            pending_bytes += len(load.data) if isinstance(load, Held) else 0
        yield number, keys, futures


def _passes(
    engine: "Engine", batches: Iterable[tuple[int, list[str], list["Future[AnyItem | ItemError]"]]]
) -> Generator[tuple[int, list[str], list[Answer]], None, None]:
    for number, keys, futures in batches:
        yield number, keys, answer(engine, [future.result() for future in futures])


def _ahead(items: Generator[T, None, None], name: str) -> Generator[T, None, None]:
    """Prefetch: a thread makes the next item while the current one is used."""
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
    embedding = job.embedding != "none"
    return Options(job.bundle, job.version or None, job.mode or None, embedding, job.labels, job.neighbors)
