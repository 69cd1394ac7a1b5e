"""HTML reports and tables of a job's results. A page is one file that loads nothing; its pictures are small JPEGs."""

import base64
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cascade.atomic import write_bytes, write_text
from cascade.errors import CascadeError
from cascade.model.decoding import ImageError, decode
from cascade.offline.job import writing
from cascade.offline.sample import ALIKE as THRESHOLD
from cascade.offline.sample import PICTURES, Sample, near_duplicates, outliers, sample
from cascade.offline.sources import again
from cascade.tsne import FEWEST, places

if TYPE_CHECKING:
    import pyarrow as pa

    from cascade.offline.predict import Summary

SIDE = 96  # pixels of the longer side of a picture
CLUSTERS = 64  # with a contact sheet, the largest ones
GROUPS = 200  # of duplicates, and outliers, with pictures
ALIKE, FAR = 12, 24  # groups of near-duplicates, and outliers, of a job's report
PLOT = 640  # pixels of the map's side
MAPPED = 1000  # rows that t-SNE places in it, for a short report after a long job
COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#994455", "#117733", "#332288")


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
    alike, far = _alike(drawn), _far(drawn)
    shown = [*drawn.paths.values(), *(captions for _, captions in alike), far]
    render(
        path,
        "report.html",
        title=f"{summary.bundle}/{summary.version}: {summary.rows} images",
        summary=summary,
        clusters=clusters,
        errors=[(kind, n, drawn.examples.get(kind, [])) for kind, n in summary.errors.items()],
        points=_points(drawn),
        sampled=len(drawn.of),
        plot=PLOT,
        threshold=THRESHOLD,
        alike=alike,
        far=far,
        colors={k: COLORS[k % len(COLORS)] for k in sorted(drawn.clusters)},
        sheets=[
            (f"Cluster {k}: {n} images", {name: Path(name).name for name in drawn.paths[k]})
            for k, n in drawn.clusters.most_common(CLUSTERS)
        ],
        pictures=thumbnails(dict.fromkeys(name for names in shown for name in names)),
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
    """The dots of the map: x and y in pixels, path, cluster; none where there are too few images."""
    if drawn.points is None or len(drawn.points) < FEWEST:
        return []
    unit = drawn.points / np.maximum(np.linalg.norm(drawn.points, axis=1, keepdims=True), 1e-12)
    dots = PLOT * (0.02 + 0.96 * places(unit, MAPPED))
    return [(x, PLOT - y, path, k) for (x, y), (path, k) in zip(dots.tolist(), drawn.of, strict=True)]


def _alike(drawn: Sample) -> list[tuple[str, dict[str, str]]]:
    """The largest groups of near-duplicates in the sample: heading, and captions by path."""
    if drawn.points is None:
        return []
    groups = near_duplicates(drawn.points)[:ALIKE]
    paths = [[drawn.of[row][0] for row in group] for group in groups]
    return [(f"{len(own)} images", {path: Path(path).name for path in own[:PICTURES]}) for own in paths]


def _far(drawn: Sample) -> dict[str, str]:
    """Captions of the sample's outliers by path, the farthest first."""
    if drawn.points is None or len(drawn.points) < 2:
        return {}
    named = ((drawn.of[row][0], distance) for row, distance in outliers(drawn.points, FAR))
    return {path: f"{distance:.3f} {Path(path).name}" for path, distance in named}
