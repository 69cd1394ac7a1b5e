"""Build an index from what ``cascade predict`` wrote, add images to it, and remove some."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cascade import atomic
from cascade.engine.results import AUTO
from cascade.errors import CascadeError
from cascade.offline.index import vectors as kinds
from cascade.offline.index.files import ADDING, changing, read, write
from cascade.offline.index.memory import CHUNK, About, check, unit
from cascade.offline.index.metadata import joined
from cascade.offline.index.metadata import read as read_metadata
from cascade.offline.index.vectors import Kind
from cascade.offline.index.where import matching
from cascade.progress import Advance

if TYPE_CHECKING:
    import pyarrow as pa

    from cascade.engine.engine import Engine

MADE_BY = ("bundle", "version", "digest", "mode")


@dataclass(frozen=True)
class Change:
    """What an update did: the new card, and the rows that were added and removed."""

    about: About
    added: int
    removed: int


def build(
    predictions: Path, out: Path, kind: Kind = "flat", device: str = "cpu", metadata: Path | None = None
) -> About:
    """Index the embeddings that ``cascade predict`` stored, in a new folder; rows with an error are left out.

    Args:
        predictions: a Parquet file or a folder of them.
        kind: flat is exact; ivf searches the nearest lists only; hnsw is a graph, fast and larger.
        device: cuda builds a flat or ivf index on the GPU (needs the extra ``gpu``).
        metadata: more columns by path, see ``cascade.offline.index.metadata``.

    Raises:
        CascadeError: there are no embeddings, they are of several bundles, or ``out`` can't be written.
    """
    if out.exists():
        raise CascadeError(f"{out} exists: name a new folder, or add to it with cascade index add")
    if not out.parent.is_dir():
        raise CascadeError(f"{out} cannot be written: name a folder in one that exists")
    files, (bundle, version, digest, mode), dim = _predicted(predictions)
    about = About(kind, bundle, version, digest, mode, dim)
    rows = sum(len(each) for each, _ in _embeddings(files))
    vectors = kinds.on_device(kinds.empty(kind, dim, rows), kind, device)
    if not vectors.is_trained:
        vectors.train(_some(files, rows, kinds.TRAINING * kinds.lists(rows)))
    about, table = _append(about, vectors, files, metadata)
    try:
        with atomic.folder(out) as beside:
            return write(beside, about, kinds.on_cpu(vectors, kind, device), table)
    except OSError as error:
        raise atomic.not_written(out, error) from error


def add(folder: Path, predictions: Path, metadata: Path | None = None) -> Change:
    """Add what ``cascade predict`` wrote to an index. A path that it already has is replaced, with a new id.

    Raises:
        CascadeError: the predictions are of another bundle or mode, or the index cannot be changed.
    """
    with changing(folder):
        return _add(folder, predictions, metadata)


def add_images(
    folder: Path,
    engine: "Engine",
    sources: Sequence[str | Path],
    metadata: Path | None = None,
    progress: Advance = lambda done, total: None,
) -> Change:
    """Predict images with the index's bundle, and ``add`` them.

    Args:
        sources: see ``cascade.offline.sources.expand``. progress: see ``cascade.progress``.

    Raises:
        CascadeError: as ``add``; or the engine does not hold the index's bundle, or there are no images.
    """
    from cascade.engine.results import Options
    from cascade.offline.predict import predict_files

    with changing(folder) as about:
        check(about, engine)
        options = Options(about.bundle, about.version, about.mode, labels=1)
        predict_files(engine, sources, folder / ADDING, options, embedding="float32", progress=progress)
        return _add(folder, folder / ADDING, metadata)


def remove(folder: Path, ids: Sequence[int] = (), where: Sequence[str] = ()) -> Change:
    """Remove rows by their ids, or those that fit all conditions (see ``cascade.offline.index.where``).

    Raises:
        CascadeError: there is no row with one of the ids, a condition is malformed, or the index cannot be changed.
    """
    with changing(folder):
        index = read(folder)
        gone = matching(index.rows, where) if where else np.unique(np.array(ids, np.int64))
        if len(unknown := np.setdiff1d(gone, index.ids)):
            raise CascadeError(f"{folder} has no row with the id {unknown[0]}: nothing was removed")
        if not len(gone):
            return Change(index.about, 0, 0)
        if len(gone) == index.about.rows:
            raise CascadeError(f"these are all rows of {folder}: delete the folder instead")
        kinds.make_writable(index.vectors, index.about.kind)
        rows = _without(index.rows, gone)
        vectors = kinds.remove(index.vectors, index.about.kind, gone, rows["id"].to_numpy())
        return Change(write(folder, index.about, vectors, rows), 0, len(gone))


def _add(folder: Path, predictions: Path, metadata: Path | None) -> Change:
    import pyarrow as pa
    import pyarrow.compute as pc

    index = read(folder)
    about, before = index.about, index.rows
    files, made_by, _ = _predicted(predictions)
    if made_by != tuple(getattr(about, name) for name in MADE_BY):
        raise CascadeError(f"{predictions} was made by another bundle or mode than {folder}: predict with the same")
    kinds.make_writable(index.vectors, about.kind)
    about, rows = _append(about, index.vectors, files, metadata)
    added = len(rows)
    gone = before["id"].filter(pc.is_in(before["path"], value_set=rows["path"].combine_chunks())).to_numpy()
    try:
        rows = pa.concat_tables([_without(before, gone), rows], promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise CascadeError(f"{metadata} has other types than the index: {error}") from None
    vectors = kinds.remove(index.vectors, about.kind, gone, rows["id"].to_numpy())
    return Change(write(folder, about, vectors, rows), added, len(gone))


def _append(about: About, vectors: Any, files: list[Path], metadata: Path | None) -> tuple[About, "pa.Table"]:
    """Add all embeddings of predictions to FAISS's index, with new ids; return their rows."""
    import pyarrow as pa

    known = None if metadata is None else read_metadata(metadata)
    tables: list[pa.Table] = []
    first = about.next_id
    for embeddings, rows in _embeddings(files):
        ids = np.arange(first, first + len(rows), dtype=np.int64)
        vectors.add_with_ids(embeddings, ids)
        tables.append(rows.add_column(0, "id", pa.array(ids)))
        first += len(rows)
    table = pa.concat_tables(tables).combine_chunks()
    return replace(about, next_id=first), table if known is None else joined(table, known)


def _without(rows: "pa.Table", gone: np.ndarray) -> "pa.Table":
    """The rows except those with the ids ``gone``."""
    import pyarrow as pa
    import pyarrow.compute as pc

    return rows.filter(pc.invert(pc.is_in(rows["id"], value_set=pa.array(gone, pa.int64()))))


def _predicted(predictions: Path) -> tuple[list[Path], tuple[str, ...], int]:
    """The Parquet files of a job, what made them (``MADE_BY``), and the size of embeddings. Raises CascadeError."""
    import pyarrow.parquet as pq

    files = sorted(predictions.glob("*.parquet")) if predictions.is_dir() else [predictions]
    if not files or not files[0].is_file():
        raise CascadeError(f"{predictions} has no Parquet file: name what cascade predict wrote")
    schemas = [pq.read_schema(path) for path in files]
    made_by = {tuple((s.metadata or {}).get(name.encode(), b"").decode() for name in MADE_BY) for s in schemas}
    if len(made_by) != 1:
        raise CascadeError(f"{predictions} has rows of several bundles or modes: index them one by one")
    names = made_by.pop()
    if names[MADE_BY.index("bundle")] == AUTO:
        raise CascadeError(f"{predictions} has rows of several bundles, whose embeddings can't be compared")
    if "embedding" not in schemas[0].names or not names[MADE_BY.index("digest")]:
        raise CascadeError(f"{predictions} has no embeddings of ours: predict with --embedding float16")
    if next(_embeddings(files), None) is None:
        raise CascadeError(f"{predictions} has nothing but errors: there is nothing to index")
    return files, names, schemas[0].field("embedding").type.list_size


def _embeddings(files: list[Path]) -> Iterator[tuple[np.ndarray, "pa.Table"]]:
    """Embeddings, L2-normalized, and their rows, CHUNK at a time, without errors."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    schema = pa.schema({"path": pa.string(), "cluster": pa.int64(), "ood": pa.float32(), "label": pa.string()})
    for path in files:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(CHUNK, columns=["path", "cluster", "ood", "labels", "embedding"]):
                batch = batch.filter(batch.column("embedding").is_valid())
                if batch.num_rows:
                    column = batch.column("embedding")
                    values = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)
                    best = pc.list_slice(batch.column("labels"), 0, 1, return_fixed_size_list=True).values
                    columns = [batch.column(name) for name in ("path", "cluster", "ood")]
                    rows = pa.table([*columns, pc.struct_field(best, "name")], names=schema.names)
                    yield unit(values), rows.cast(schema)


def _some(files: list[Path], rows: int, most: int) -> np.ndarray:
    """About ``most`` embeddings, spread evenly."""
    step = max(1, rows // most)
    found, first = [], 0
    for embeddings, _ in _embeddings(files):
        found.append(embeddings[-first % step :: step])
        first += len(embeddings)
    return np.concatenate(found)
