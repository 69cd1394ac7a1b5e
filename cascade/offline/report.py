"""HTML reports and tables of a job's results. A page is one file that loads nothing; its pictures are small JPEGs."""

import base64
import heapq
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cascade.atomic import write_bytes, write_text
from cascade.errors import CascadeError
from cascade.model.preprocessing import ImageError, decode
from cascade.offline.job import writing
from cascade.offline.sources import again

if TYPE_CHECKING:
    import pyarrow as pa

    from cascade.offline.predict import Summary

PICTURES, SIDE = 12, 96  # of a cluster; pixels of the longer side
POINTS = 2000  # of the map
CLUSTERS = 64  # with a contact sheet, the largest ones
GROUPS = 200  # of duplicates, and outliers, with pictures
EXAMPLES = 5  # paths of each kind of error
PLOT = 640  # pixels of the map's side
COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#994455", "#117733", "#332288")


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


def write(summary: "Summary", predictions: Iterable[Path], trained: Sequence[float], path: Path) -> None:
    """Write the report of a job as HTML.

    Args:
        predictions: the job's Parquet files.
        trained: share of each cluster in training; empty without a router.

    Raises:
        CascadeError: the report cannot be written.
    """
    drawn = sample(predictions)
    clusters = [
        (k, drawn.clusters[k], summary.clusters.get(k, 0.0), trained[k] if k < len(trained) else None)
        for k in sorted({*drawn.clusters, *range(len(trained))})
    ]
    render(
        path,
        "report.html",
        title=f"{summary.bundle}/{summary.version}: {summary.rows} images",
        summary=summary,
        clusters=clusters,
        errors=[(kind, n, drawn.examples.get(kind, [])) for kind, n in summary.errors.items()],
        points=_points(drawn),
        plot=PLOT,
        colors={k: COLORS[k % len(COLORS)] for k in sorted(drawn.clusters)},
        sheets=[
            (f"Cluster {k}: {n} images", {name: Path(name).name for name in drawn.paths[k]})
            for k, n in drawn.clusters.most_common(CLUSTERS)
        ],
        pictures=thumbnails(name for names in drawn.paths.values() for name in names),
    )


def render(path: Path, template: str, **values: object) -> None:
    """Write a page from a template in ``cascade/offline/templates``; values are escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("cascade.offline"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template(template).render(values)
    write_bytes(path, [page.encode(errors="backslashreplace")])


def thumbnails(paths: Iterable[str]) -> dict[str, str]:
    """Small JPEGs as data: URLs, by path; images that cannot be read are left out."""
    urls = {}
    for path, load in again(paths):
        try:
            picture = decode(load())
        except ImageError:  # deleted since; the page says so
            continue
        picture.thumbnail((SIDE, SIDE))
        picture.save(out := io.BytesIO(), "jpeg", quality=80)
        urls[path] = f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"
    return urls


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


def project_2d(points: np.ndarray) -> np.ndarray:
    """Project L2-normalized embeddings [n, dim] on two principal components: [n, 2], each in [0, 1]."""
    unit = points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
    centered = unit - unit.mean(0)
    _, axes = np.linalg.eigh(centered.T @ centered)  # in order of ascending variance
    components = centered @ axes[:, : -min(3, axes.shape[1] + 1) : -1]
    components = np.pad(components, ((0, 0), (0, 2 - components.shape[1])))
    span = np.maximum(np.ptp(components, axis=0), 1e-12)
    scaled: np.ndarray = (components - components.min(0)) / span
    return scaled


def write_table(found: "pa.Table", path: Path) -> None:
    """Write a table as CSV or Parquet, by the suffix of ``path``.

    Raises:
        CascadeError: another suffix, or the file cannot be written.
    """
    import csv

    if path.suffix not in (".csv", ".parquet") or not path.absolute().parent.is_dir():
        raise CascadeError(f"{path} cannot be written: name a .csv or .parquet file in a folder that exists")
    if path.suffix == ".parquet":
        with writing(path, found.schema) as append:
            append(found)
        return
    text = io.StringIO(newline="")
    rows = csv.writer(text)
    rows.writerow(found.column_names)
    rows.writerows(zip(*(map(_cell, column.to_pylist()) for column in found.columns), strict=True))
    write_text(path, [text.getvalue()])


def _cell(value: object) -> object:
    """A value for CSV. Spreadsheets evaluate text that begins with = + - @ or a tab; an apostrophe prevents that."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def duplicates_page(found: "pa.Table", threshold: float, path: Path) -> None:
    """Groups of duplicates with their pictures, the largest first; see ``cascade.offline.index.duplicates``."""
    groups: dict[int, dict[str, str]] = {}
    sizes: Counter[int] = Counter(found["group"].to_pylist())
    for row in found.to_pylist():
        group = groups.setdefault(row["group"], {}) if row["group"] < GROUPS else {}
        if len(group) < PICTURES:
            group[row["path"]] = f"{row['similarity']:.3f} {Path(row['path']).name}"
    render(
        path,
        "sheets.html",
        title=f"{len(found)} images in {len(sizes)} groups of duplicates",
        note=f"Linked by a cosine similarity of at least {threshold:g}. The page shows up to {GROUPS} groups.",
        sheets=[(f"Group {number}: {sizes[number]} images", group) for number, group in groups.items()],
        pictures=thumbnails(name for group in groups.values() for name in group),
    )


def outliers_page(found: "pa.Table", path: Path) -> None:
    """Outliers with their pictures, the farthest first; see ``cascade.offline.index.outliers``."""
    rows = found.slice(0, GROUPS).to_pylist()
    captions = {row["path"]: f"{row['distance']:.3f} {Path(row['path']).name}" for row in rows}
    render(
        path,
        "sheets.html",
        title=f"{len(found)} outliers",
        note=f"Mean cosine distance to the nearest other images. The page shows up to {GROUPS}.",
        sheets=[("", captions)],
        pictures=thumbnails(captions),
    )


def check(path: Path, out: Path) -> None:
    """Check that a report can be written to ``path`` beside the output ``out``. Raises CascadeError."""
    if not path.absolute().parent.is_dir() or path.is_dir():
        raise CascadeError(f"{path} cannot be written: name a file in a folder that exists")
    if path.parent.resolve() == out.resolve() and not path.name.startswith("_"):
        raise CascadeError(f"{path} is among Parquet files, whose readers would take it for one: call it _{path.name}")


def _points(drawn: Sample) -> list[tuple[float, float, str, int]]:
    """The dots of the map: x and y in pixels, path, cluster."""
    if drawn.points is None or len(drawn.points) < 2:
        return []
    places = PLOT * (0.02 + 0.96 * project_2d(drawn.points))
    return [(x, PLOT - y, path, k) for (x, y), (path, k) in zip(places.tolist(), drawn.of, strict=True)]
