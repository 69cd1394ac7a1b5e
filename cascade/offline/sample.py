"""A random sample of a job's rows, small enough for one page: pictures, a map, near-duplicates, outliers."""

import heapq
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

PICTURES = 12  # of a cluster
POINTS = 2000  # embeddings
EXAMPLES = 5  # paths of each kind of error
ALIKE = 0.98  # cosine similarity of near-duplicates
NEAREST = 10  # images that an outlier is far from


@dataclass
class Sample:
    """A random draw from a job's rows.

    Attributes:
        rows: number of all rows. clusters: number of rows of each cluster.
        paths: up to PICTURES paths of each cluster.
        examples: the first few paths of each kind of error.
        points: up to POINTS embeddings, float32 [n, dim]; None if none are stored. of: their path and cluster.
    """

    rows: int = 0
    clusters: Counter[int] = field(default_factory=Counter)
    paths: dict[int, list[str]] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    points: np.ndarray | None = None
    of: list[tuple[str, int]] = field(default_factory=list)


def sample(predictions: Iterable[Path], seed: int = 0) -> Sample:
    """Sample uniformly from the rows of Parquet files, in one pass and bounded memory.

    Each row gets a random number, and the rows with the smallest are kept.
    """
    import pyarrow.parquet as pq

    random, drawn = np.random.default_rng(seed), Sample()
    paths: dict[int, list[tuple[float, str]]] = {}
    points: list[tuple[float, str, int, np.ndarray]] = []
    for path in predictions:
        with pq.ParquetFile(path) as file:
            embedded = "embedding" in file.schema_arrow.names
            columns = ["path", "cluster", "error_kind", *(["embedding"] if embedded else [])]
            for batch in file.iter_batches(1024, columns=columns):
                draws = random.random(batch.num_rows)
                drawn.rows += batch.num_rows
                names, kinds = batch.column("path").to_pylist(), batch.column("error_kind").to_pylist()
                for row, cluster in enumerate(batch.column("cluster").to_pylist()):
                    if cluster is None:
                        examples = drawn.examples.setdefault(kinds[row], [])
                        examples += [names[row]][: EXAMPLES - len(examples)]
                        continue
                    drawn.clusters[cluster] += 1
                    _keep_smallest(paths.setdefault(cluster, []), (draws[row], names[row]), PICTURES)
                    if embedded and (len(points) < POINTS or draws[row] < -points[0][0]):
                        vector = np.array(batch.column("embedding")[row].as_py(), np.float32)
                        _keep_smallest(points, (draws[row], names[row], cluster, vector), POINTS)
    drawn.paths = {cluster: [row[1] for row in sorted(rows, reverse=True)] for cluster, rows in paths.items()}
    if points:
        points.sort(key=lambda point: -point[0])
        drawn.points = np.stack([vector for *_, vector in points])
        drawn.of = [(name, cluster) for _, name, cluster, _ in points]
    return drawn


def _keep_smallest(heap: list[Any], row: tuple[Any, ...], most: int) -> None:
    """Add a row, whose first number is its draw, and drop the one with the largest draw beyond ``most`` rows."""
    entry = (-row[0], *row[1:])  # heapq keeps the smallest entry, the largest draw, at the front
    if len(heap) < most:
        heapq.heappush(heap, entry)
    else:
        heapq.heappushpop(heap, entry)


def near_duplicates(points: np.ndarray, threshold: float = ALIKE) -> list[np.ndarray]:
    """Groups of rows that are linked by a cosine similarity of at least ``threshold``, the largest first.

    Args:
        points: embeddings float32 [n, dim]; n is small, since all pairs are compared.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    links = coo_array(_similarities(points) >= threshold)
    count, component = connected_components(links, directed=False)
    groups = (np.flatnonzero(component == k) for k in range(count))
    return sorted((group for group in groups if len(group) > 1), key=lambda group: (-len(group), group[0]))


def outliers(points: np.ndarray, most: int) -> list[tuple[int, float]]:
    """The rows [n, dim] that are farthest from their nearest others, with that distance: 1 minus the mean cosine."""
    similarities = _similarities(points)
    np.fill_diagonal(similarities, -np.inf)
    k = min(NEAREST, len(points) - 1)
    distances = 1 - np.partition(similarities, -k, axis=1)[:, -k:].mean(axis=1)
    order = np.argsort(-distances, kind="stable")[:most]
    return [(int(row), float(distances[row])) for row in order]


def _similarities(points: np.ndarray) -> np.ndarray:
    unit = points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
    return np.asarray(unit @ unit.T)
