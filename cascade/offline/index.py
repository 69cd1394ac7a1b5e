"""A search index over the embeddings of an offline job: FAISS with cosine similarity, and the rows' columns.

    INDEX/index.json      kind, bundle with its digest, mode, rows, and SHA-256 of the other two
          index.faiss     FAISS's own format
          rows.parquet    path, cluster, ood

FAISS itself parses index.faiss: open only indices from sources that you trust.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cascade import atomic
from cascade.engine.results import AUTO, ItemError, Options
from cascade.errors import CascadeError
from cascade.model.heads import faiss
from cascade.offline.job import writing

if TYPE_CHECKING:
    import pyarrow as pa

    from cascade.engine.engine import Engine
    from cascade.engine.pixels import Source

Kind = Literal["flat", "ivf", "hnsw"]
CARD, VECTORS, ROWS = "index.json", "index.faiss", "rows.parquet"
CHUNK = 16_384  # embeddings in memory besides the index
LINKS, EFFORT = 32, 128  # HNSW: links per row; rows that a search visits
TRAINING = 64  # IVF: training rows per list
NEAREST = 32  # rows that each row is compared with for duplicates


@dataclass(frozen=True)
class About:
    """index.json. ``sums`` are by file."""

    kind: Kind
    bundle: str
    version: str
    digest: str
    mode: str
    dim: int
    rows: int
    sums: dict[str, str]
    format: int = 1


@dataclass(frozen=True, eq=False)
class Index:
    """An index in memory.

    Attributes:
        about: how it was made.
        vectors: FAISS's index; row n is row n of ``rows``. rows: path, cluster, ood.
    """

    about: About
    vectors: Any
    rows: "pa.Table"

    def nearest(self, embeddings: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Cosine similarities float32 [B, k], descending, and rows int64 [B, k]; -1 for a row that was not found."""
        similarities, rows = self.vectors.search(unit(embeddings), min(k, self.about.rows))
        return similarities, rows

    def chunks(self, size: int = CHUNK) -> Iterator[tuple[int, np.ndarray]]:
        """Yield all embeddings in chunks: the number of the first row, and float32 [n, dim], L2-normalized."""
        for first in range(0, self.about.rows, size):
            yield first, self.vectors.reconstruct_n(first, min(size, self.about.rows - first))

    def described(self, row: int, similarity: float) -> dict[str, Any]:
        """One result in plain types."""
        return {name: self.rows[name][row].as_py() for name in ("path", "cluster", "ood")} | {"similarity": similarity}

    def options(self) -> Options:
        """Options to predict an image with, so that it can be searched for."""
        return Options(self.about.bundle, self.about.version, self.about.mode, True, 0, 0)


def build(predictions: Path, out: Path, kind: Kind = "flat", device: str = "cpu") -> About:
    """Index the embeddings that ``cascade predict`` stored, in a new folder; rows with an error are left out.

    Args:
        predictions: a Parquet file or a folder of them.
        kind: flat is exact; ivf searches the nearest lists only; hnsw is a graph, fast and larger.
        device: cuda builds a flat or ivf index on the GPU (needs the extra ``gpu``).

    Raises:
        CascadeError: there are no embeddings, they are of several bundles, or ``out`` can't be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if out.exists():
        raise CascadeError(f"{out} exists: name a new folder")
    if not out.parent.is_dir():
        raise CascadeError(f"{out} cannot be written: name a folder in one that exists")
    files = _files(predictions)
    metadata = [pq.read_schema(path).metadata or {} for path in files]
    made_by = {tuple(each.get(name.encode(), b"").decode() for name in _MADE_BY) for each in metadata}
    if len(made_by) != 1:
        raise CascadeError(f"{predictions} has rows of several bundles or modes: index them one by one")
    bundle, version, digest, mode = made_by.pop()
    if bundle == AUTO:
        raise CascadeError(f"{predictions} has rows of several bundles, whose embeddings can't be compared")
    field = pq.read_schema(files[0])
    if "embedding" not in field.names or not digest:
        raise CascadeError(f"{predictions} has no embeddings of ours: predict with --embedding float16")
    dim, rows = field.field("embedding").type.list_size, sum(len(each) for each, _ in _embeddings(files))
    if not rows:
        raise CascadeError(f"{predictions} has nothing but errors: there is nothing to index")
    vectors = _placed(_empty(kind, dim, rows), device)
    if not vectors.is_trained:
        vectors.train(_some(files, rows, TRAINING * _lists(rows)))
    columns = pa.schema({"path": pa.string(), "cluster": pa.int64(), "ood": pa.float32()})
    try:
        with atomic.folder(out) as beside:
            with writing(beside / ROWS, columns) as append:
                for embeddings, found in _embeddings(files):
                    vectors.add(embeddings)
                    append(found.cast(columns))
            faiss().write_index(_back(vectors, device), str(beside / VECTORS))
            sums = {name: _sum(beside / name) for name in (VECTORS, ROWS)}
            about = About(kind, bundle, version, digest, mode, dim, rows, sums)
            (beside / CARD).write_text(json.dumps(asdict(about), indent=1) + "\n")
    except (OSError, RuntimeError) as error:  # FAISS raises the latter where it can't write
        raise CascadeError(f"{out} could not be written ({error}): free disk space, or name another folder") from error
    return about


def read(folder: Path, device: str = "cpu") -> Index:
    """Read an index from its folder and check every byte against its card.

    Raises:
        CascadeError: the folder holds no index, or a damaged one.
    """
    import pyarrow.parquet as pq

    try:
        about = About(**json.loads((folder / CARD).read_text()))
        for name, wanted in about.sums.items():
            if name not in (VECTORS, ROWS) or _sum(folder / name) != wanted:
                raise CascadeError(f"{folder / name} is damaged: build the index again")
        if about.format != 1 or set(about.sums) != {VECTORS, ROWS}:
            raise CascadeError(f"{folder} has a format that this version does not know: build the index again")
        rows, vectors = pq.read_table(folder / ROWS), faiss().read_index(str(folder / VECTORS))
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        message = f"{folder} is no index ({type(error).__name__}): make one with cascade index build"
        raise CascadeError(message) from error
    if not len(rows) == vectors.ntotal == about.rows or vectors.d != about.dim:
        raise CascadeError(f"{folder} does not fit together: build the index again")
    if about.kind == "ivf":
        vectors.nprobe = max(1, vectors.nlist // 8)
        vectors.make_direct_map()
    return Index(about, _placed(vectors, device), rows)


def unit(embeddings: np.ndarray) -> np.ndarray:
    """float32 [n, dim], L2-normalized; an embedding of zeros stays zero."""
    vectors = np.ascontiguousarray(embeddings, np.float32)
    scaled: np.ndarray = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return scaled


def search(index: Index, engine: "Engine", images: Sequence["Source"], k: int = 10) -> list[Any]:
    """For each image the nearest rows, see ``Index.described``, nearest first, or its ItemError.

    Raises:
        CascadeError: the engine does not hold the bundle that the index was made with.
    """
    fits(index, engine)
    answers = engine.predict(images, index.options())
    return [answer if isinstance(answer, ItemError) else found(index, answer.embedding, k) for answer in answers]


def fits(index: Index, engine: "Engine") -> None:
    """Raise CascadeError unless the engine holds the bundle that the index was made with."""
    from cascade.bundle.format import digest

    bundle = engine.find(index.about.bundle, index.about.version)
    name = f"{index.about.bundle}/{index.about.version}"
    if isinstance(bundle, ItemError):
        raise CascadeError(f"the index was made with bundle {name}, which is not loaded: {bundle.message}")
    if digest(bundle) != index.about.digest:
        raise CascadeError(f"the index was made with another bundle called {name}: build it again")


def duplicates(index: Index, threshold: float = 0.98) -> "pa.Table":
    """Groups of near-duplicates: connected components of pairs with a cosine similarity of at least ``threshold``.

    Returns:
        group (0 is the largest), path, similarity to the group's first image; in the order of the groups.
    """
    import pyarrow as pa
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    left, right = [], []
    for first, block in index.chunks(1024):
        similarities, rows = index.nearest(block, NEAREST)
        query, place = np.nonzero((similarities >= threshold) & (rows >= 0))
        left.append(first + query)
        right.append(rows[query, place])
    pairs = np.concatenate(left), np.concatenate(right)
    links = coo_array((np.ones(len(pairs[0]), bool), pairs), shape=(index.about.rows, index.about.rows))
    count, component = connected_components(links, directed=False)
    order = np.argsort(component, kind="stable")
    groups = np.split(order, np.cumsum(np.bincount(component, minlength=count))[:-1])
    members = sorted((g for g in groups if len(g) > 1), key=lambda group: (-len(group), group[0]))
    numbers, paths, similarities_to = [], [], []
    for number, group in enumerate(members):
        vectors = np.stack([index.vectors.reconstruct(int(row)) for row in group])
        numbers += [number] * len(group)
        paths += index.rows["path"].take(pa.array(group)).to_pylist()
        similarities_to += (vectors @ vectors[0]).clip(-1, 1).tolist()
    kinds = {"group": pa.int64(), "path": pa.string(), "similarity": pa.float32()}
    return pa.table([numbers, paths, similarities_to], schema=pa.schema(kinds))


def outliers(index: Index, top: int = 100, k: int = 10) -> "pa.Table":
    """The images that are farthest from all others.

    Returns:
        path, distance (1 minus the mean cosine similarity to the ``k`` nearest others), cluster, ood; farthest first.
    """
    import pyarrow as pa

    distances = np.zeros(index.about.rows, np.float32)
    for first, block in index.chunks(1024):
        similarities, rows = index.nearest(block, k + 1)
        own = rows == first + np.arange(len(block))[:, None]
        own[~own.any(1), -1] = True  # its own row may be missing among more than k equal ones
        others = np.where(rows >= 0, similarities, -1)[~own].reshape(len(block), -1)
        distances[first : first + len(block)] = 1 - others.mean(1) if others.shape[1] else 0
    order = np.argsort(-distances, kind="stable")[:top]
    found = index.rows.take(pa.array(order))
    return found.add_column(1, "distance", pa.array(distances[order]))


def found(index: Index, embedding: np.ndarray | None, k: int) -> list[dict[str, Any]]:
    """The rows nearest to one embedding, in plain types, nearest first."""
    assert embedding is not None
    (similarities,), (rows,) = index.nearest(embedding[None], k)
    pairs = zip(rows.tolist(), similarities.tolist(), strict=True)
    return [index.described(row, similarity) for row, similarity in pairs if row >= 0]


_MADE_BY = ("bundle", "version", "digest", "mode")


def _files(predictions: Path) -> list[Path]:
    files = sorted(predictions.glob("*.parquet")) if predictions.is_dir() else [predictions]
    if not files or not files[0].is_file():
        raise CascadeError(f"{predictions} has no Parquet file: name what cascade predict wrote")
    return files


def _embeddings(files: list[Path]) -> Iterator[tuple[np.ndarray, "pa.Table"]]:
    """Embeddings, L2-normalized, and their rows, CHUNK at a time, without errors."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for path in files:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(CHUNK, columns=["path", "cluster", "ood", "embedding"]):
                batch = batch.filter(batch.column("embedding").is_valid())
                if batch.num_rows:
                    column = batch.column("embedding")
                    values = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)
                    yield unit(values), pa.Table.from_batches([batch]).drop_columns("embedding")


def _some(files: list[Path], rows: int, most: int) -> np.ndarray:
    """About ``most`` embeddings, spread evenly."""
    step = max(1, rows // most)
    found, first = [], 0
    for embeddings, _ in _embeddings(files):
        found.append(embeddings[-first % step :: step])
        first += len(embeddings)
    return np.concatenate(found)


def _lists(rows: int) -> int:
    return max(1, min(65_536, int(4 * rows**0.5), rows // 39))


def _empty(kind: Kind, dim: int, rows: int) -> Any:
    module = faiss()
    product = module.METRIC_INNER_PRODUCT
    match kind:
        case "flat":
            return module.IndexFlatIP(dim)
        case "hnsw":
            index = module.IndexHNSWFlat(dim, LINKS, product)
            index.hnsw.efSearch = EFFORT
            return index
        case "ivf":
            quantizer = module.IndexFlatIP(dim)
            index = module.IndexIVFFlat(quantizer, dim, _lists(rows), product)
            quantizer.this.disown()
            index.own_fields = True
            return index
    raise CascadeError(f"unknown kind of index {kind!r}: flat, ivf or hnsw")


def _placed(index: Any, device: str) -> Any:
    """Move an index to ``device``; HNSW indices stay on the CPU."""
    module = faiss()
    if device == "cpu" or isinstance(index, module.IndexHNSWFlat):
        return index
    if not getattr(module, "get_num_gpus", lambda: 0)():
        raise CascadeError("FAISS sees no GPU here: pip install 'cascade-vision[gpu]', or omit --device")
    return module.index_cpu_to_all_gpus(index)


def _back(index: Any, device: str) -> Any:
    return index if device == "cpu" or isinstance(index, faiss().IndexHNSWFlat) else faiss().index_gpu_to_cpu(index)


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
