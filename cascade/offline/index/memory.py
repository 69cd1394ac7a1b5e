"""An index in memory: the rows nearest to an embedding, also among those that fit conditions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from cascade.engine.results import ItemError, Options
from cascade.errors import CascadeError
from cascade.offline.index.metadata import OWN
from cascade.offline.index.vectors import Kind, parameters
from cascade.offline.index.where import matching

if TYPE_CHECKING:
    import pyarrow as pa

    from cascade.engine.engine import Engine
    from cascade.engine.pixels import Source

CHUNK = 16_384  # embeddings in memory besides the index
FEW = 10_000
"""Up to this many rows are compared one by one: lists and graphs would visit too few rows of a narrow filter."""


@dataclass(frozen=True)
class About:
    """The card of an index.

    Attributes:
        kind: of FAISS's index. bundle, version, digest, mode: what made the embeddings. dim: of them.
        rows: number of images. next_id: of the next image; ids are never reused.
        generation: number of the files; each update writes new ones. sums: their SHA-256, by name.
    """

    kind: Kind
    bundle: str
    version: str
    digest: str
    mode: str
    dim: int
    rows: int = 0
    next_id: int = 0
    generation: int = 0
    sums: dict[str, str] | None = None
    format: int = 2


@dataclass(frozen=True, eq=False)
class Index:
    """An index in memory.

    Attributes:
        about: how it was made.
        vectors: FAISS's index, by the ids of the rows.
        rows: id (ascending), path, cluster, ood, label, and columns of metadata.
    """

    about: About
    vectors: Any
    rows: "pa.Table"

    @cached_property
    def ids(self) -> np.ndarray:
        """int64 [rows], ascending."""
        ids: np.ndarray = self.rows["id"].to_numpy()
        return ids

    def matching(self, where: Sequence[str]) -> np.ndarray | None:
        """The ids, int64, of the rows that fit all conditions (see ``cascade.offline.index.where``); None for all rows.

        Raises:
            CascadeError: a condition is malformed.
        """
        return matching(self.rows, where) if where else None

    def nearest(self, embeddings: np.ndarray, k: int, among: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Cosine similarities float32 [B, k], descending, and ids int64 [B, k]; -1 for a row that was not found.

        With ``among``, int64 ids, only these rows are found, and there may be fewer than k columns.
        """
        if among is not None and len(among) <= FEW:
            return self._compared(unit(embeddings), k, among)
        if among is None and self.vectors.ntotal > self.about.rows:  # removed vectors that a graph keeps
            among = self.ids
        chosen = parameters(self.vectors, self.about.kind, among)
        similarities, ids = self.vectors.search(unit(embeddings), min(k, self.about.rows), params=chosen)
        return similarities, ids

    def chunks(self, size: int = CHUNK) -> Iterator[tuple[int, np.ndarray]]:
        """Yield all embeddings in chunks: the number of the first row, and float32 [n, dim], L2-normalized."""
        for first in range(0, self.about.rows, size):
            yield first, self.vectors.reconstruct_batch(self.ids[first : first + size])

    def rows_of(self, ids: np.ndarray) -> np.ndarray:
        """The row numbers of ids that exist."""
        return np.searchsorted(self.ids, ids)

    def found(self, embedding: np.ndarray | None, k: int, among: np.ndarray | None = None) -> list[dict[str, Any]]:
        """The rows nearest to one embedding, in plain types, nearest first: own columns, similarity, metadata."""
        assert embedding is not None
        (similarities,), (ids,) = self.nearest(embedding[None], k, among)
        rows = self.rows.take(self.rows_of(ids[ids >= 0])).to_pylist()
        return [
            {name: row.pop(name) for name in OWN} | {"similarity": similarity, "metadata": row}
            for row, similarity in zip(rows, similarities[ids >= 0].tolist(), strict=True)
        ]

    def options(self) -> Options:
        """Options to predict an image with, so that it can be searched for."""
        return Options(self.about.bundle, self.about.version, self.about.mode, True, 0, 0)

    def _compared(self, queries: np.ndarray, k: int, among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``nearest`` among a few ids, exactly."""
        vectors = self.vectors.reconstruct_batch(among).reshape(len(among), self.about.dim)
        similarities = queries @ vectors.T
        order = np.argsort(-similarities, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(similarities, order, axis=1), among[order]


def unit(embeddings: np.ndarray) -> np.ndarray:
    """float32 [n, dim], L2-normalized; an embedding of zeros stays zero."""
    vectors = np.ascontiguousarray(embeddings, np.float32)
    scaled: np.ndarray = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return scaled


def search(
    index: Index, engine: "Engine", images: Sequence["Source"], k: int = 10, among: np.ndarray | None = None
) -> list[Any]:
    """For each image the nearest rows, see ``Index.found``, nearest first, or its ItemError.

    Args:
        among: ids of the rows that may be found, see ``Index.matching``; None for all.

    Raises:
        CascadeError: the engine does not hold the bundle that the index was made with.
    """
    check(index.about, engine)
    answers = engine.predict(images, index.options())
    return [answer if isinstance(answer, ItemError) else index.found(answer.embedding, k, among) for answer in answers]


def check(about: About, engine: "Engine") -> None:
    """Raise CascadeError unless the engine holds the bundle that an index was made with."""
    from cascade.bundle.format import digest

    bundle = engine.find(about.bundle, about.version)
    name = f"{about.bundle}/{about.version}"
    if isinstance(bundle, ItemError):
        raise CascadeError(f"the index was made with bundle {name}, which is not loaded: {bundle.message}")
    if digest(bundle) != about.digest:
        raise CascadeError(f"the index was made with another bundle called {name}: build it again")
