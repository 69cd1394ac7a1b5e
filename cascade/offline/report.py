"""What a person looks at after a job: one HTML file that loads nothing, with small pictures where they can be read."""

import base64
import html
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cascade.atomic import write_text
from cascade.errors import CascadeError
from cascade.model.preprocessing import ImageError, decode
from cascade.offline.job import writing
from cascade.offline.sources import again

if TYPE_CHECKING:
    import pyarrow as pa

    from cascade.offline.predict import Summary

PICTURES, SIDE = 12, 96  # of a cluster; pixels of the longer side
POINTS = 2000  # of the map
CLUSTERS = 64  # that get a contact sheet, the largest
GROUPS = 200  # of duplicates, and outliers, that get pictures
EXAMPLES = 5  # paths of each kind of error
PLOT = 640  # pixels of the map's side
COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#994455", "#117733", "#332288")
HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #222 }}
table {{ border-collapse: collapse }} th, td {{ padding: .2em .8em; text-align: right; border-bottom: 1px solid #ddd }}
th:first-child, td:first-child, td.text {{ text-align: left; overflow-wrap: anywhere }}
figure {{ display: inline-block; width: 100px; margin: 3px; vertical-align: top; font-size: 11px; line-height: 1.2 }}
figcaption {{ overflow: hidden; text-overflow: ellipsis; white-space: nowrap }}
svg {{ border: 1px solid #ddd; max-width: 100% }}
</style></head><body>
<h1>{title}</h1>
"""


@dataclass
class Sample:
    """A random draw from a job's rows.

    Attributes:
        rows: how many there were, clusters: of each cluster.
        paths: of each cluster, up to PICTURES.
        examples: paths of each kind of error, the first few.
        points: embeddings, float32 [n, dim], n up to POINTS; none where none were stored. of: their path and cluster.
    """

    rows: int = 0
    clusters: Counter[int] = field(default_factory=Counter)
    paths: dict[int, list[str]] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    points: np.ndarray | None = None
    of: list[tuple[str, int]] = field(default_factory=list)


def write(summary: "Summary", predictions: Iterable[Path], trained: Sequence[float], path: Path) -> None:
    """The report of a job.

    Args:
        summary: of the job. predictions: its Parquet files.
        trained: share of each cluster in training; empty without a router.

    Raises:
        CascadeError: it can't be written.
    """
    drawn = sample(predictions)
    title = f"{summary.bundle}/{summary.version}: {summary.rows} images"
    page(path, title, _sections(summary, drawn, trained))


def page(path: Path, title: str, sections: Iterable[str]) -> None:
    """An HTML file of its own. Sections are HTML, the title is text."""

    def lines() -> Iterator[str]:
        yield HEAD.format(title=html.escape(title))
        yield from sections
        yield "</body></html>\n"

    write_text(path, lines())


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Text in cells; numbers are for the caller to format."""
    top = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>\n" for row in rows)
    return f"<table><tr>{top}</tr>\n{body}</table>\n"


def sheet(captions: Mapping[str, str], pictures: Mapping[str, str]) -> str:
    """Pictures side by side, in the order of ``captions`` (path to caption); those that can't be read as their name."""
    parts = []
    for path, caption in captions.items():
        shown = f'<img src="{pictures[path]}" alt="">' if path in pictures else "<em>not readable</em>"
        parts.append(
            f'<figure title="{html.escape(path)}">{shown}<figcaption>{html.escape(caption)}</figcaption></figure>'
        )
    return "\n".join(parts) + "\n"


def thumbnails(paths: Iterable[str]) -> dict[str, str]:
    """data: URLs of small JPEGs by path, of those that can be read."""
    found = {}
    for path, load in again(paths):
        try:
            picture = decode(load())
        except ImageError:  # gone since: the report says so in its place
            continue
        picture.thumbnail((SIDE, SIDE))
        picture.save(out := io.BytesIO(), "jpeg", quality=80)
        found[path] = f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"
    return found


def sample(predictions: Iterable[Path], seed: int = 0) -> Sample:
    """Go through Parquet files of ours once, in little memory, and draw from the rows, each as likely as any other."""
    import pyarrow.parquet as pq

    draw, found = np.random.default_rng(seed), Sample()
    drawn: dict[int, list[tuple[float, str]]] = {}
    points: list[tuple[float, str, int, np.ndarray]] = []
    for path in predictions:
        with pq.ParquetFile(path) as file:
            embedded = "embedding" in file.schema_arrow.names
            columns = ["path", "cluster", "error_kind", *(["embedding"] if embedded else [])]
            for batch in file.iter_batches(1024, columns=columns):
                luck = draw.random(batch.num_rows)
                found.rows += batch.num_rows
                names, kinds = batch.column("path").to_pylist(), batch.column("error_kind").to_pylist()
                for row, cluster in enumerate(batch.column("cluster").to_pylist()):
                    if cluster is None:
                        some = found.examples.setdefault(kinds[row], [])
                        some += [names[row]][: EXAMPLES - len(some)]
                        continue
                    found.clusters[cluster] += 1
                    drawn.setdefault(cluster, []).append((luck[row], names[row]))
                    if embedded and (len(points) < POINTS or luck[row] < points[POINTS - 1][0]):
                        vector = np.array(batch.column("embedding")[row].as_py(), np.float32)
                        points.append((luck[row], names[row], cluster, vector))
                points = sorted(points, key=lambda each: each[0])[:POINTS]
                drawn = {cluster: sorted(each)[:PICTURES] for cluster, each in drawn.items()}
    found.paths = {cluster: [name for _, name in each] for cluster, each in drawn.items()}
    if points:
        found.points = np.stack([each[3] for each in points])
        found.of = [(name, cluster) for _, name, cluster, _ in points]
    return found


def flat(points: np.ndarray) -> np.ndarray:
    """Embeddings [n, dim], L2-normalized, on their first two principal components: [n, 2], each in [0, 1]."""
    unit = points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
    centered = unit - unit.mean(0)
    _, axes = np.linalg.eigh(centered.T @ centered)  # rising
    found = centered @ axes[:, : -min(3, axes.shape[1] + 1) : -1]
    found = np.pad(found, ((0, 0), (0, 2 - found.shape[1])))
    span = np.maximum(np.ptp(found, axis=0), 1e-12)
    scaled: np.ndarray = (found - found.min(0)) / span
    return scaled


def write_table(found: "pa.Table", path: Path) -> None:
    """A table as CSV or Parquet, by the name's suffix.

    Raises:
        CascadeError: another suffix, or it can't be written.
    """
    import csv

    if path.suffix not in (".csv", ".parquet") or not path.parent.is_dir():
        raise CascadeError(f"{path} cannot be written: name a .csv or .parquet file in a folder that exists")
    if path.suffix == ".parquet":
        with writing(path, found.schema) as append:
            append(found)
        return
    text = io.StringIO(newline="")
    rows = csv.writer(text)
    rows.writerow(found.column_names)
    rows.writerows(zip(*(column.to_pylist() for column in found.columns), strict=True))
    write_text(path, [text.getvalue()])


def duplicates_page(found: "pa.Table", threshold: float, path: Path) -> None:
    """Groups of duplicates with their pictures, the largest first; see ``cascade.offline.index.duplicates``."""
    groups: dict[int, dict[str, str]] = {}
    sizes: Counter[int] = Counter(found["group"].to_pylist())
    for row in found.to_pylist():
        group = groups.setdefault(row["group"], {}) if row["group"] < GROUPS else {}
        if len(group) < PICTURES:
            group[row["path"]] = f"{row['similarity']:.3f} {Path(row['path']).name}"
    pictures = thumbnails(name for group in groups.values() for name in group)
    sections = [f"<p>Linked by a cosine similarity of {threshold:g} or more. The first {GROUPS} groups at most.</p>\n"]
    for number, group in groups.items():
        sections.append(f"<h2>Group {number}: {sizes[number]} images</h2>\n{sheet(group, pictures)}")
    page(path, f"{len(found)} images in {len(sizes)} groups of duplicates", sections)


def outliers_page(found: "pa.Table", path: Path) -> None:
    """Outliers with their pictures, the farthest first; see ``cascade.offline.index.outliers``."""
    rows = found.slice(0, GROUPS).to_pylist()
    captions = {row["path"]: f"{row['distance']:.3f} {Path(row['path']).name}" for row in rows}
    about = f"<p>Mean cosine distance to the nearest others. The first {GROUPS} at most.</p>\n"
    page(path, f"{len(found)} outliers", [about, sheet(captions, thumbnails(captions))])


def check(path: Path, out: Path) -> None:
    """That a report can be written there. Raises CascadeError."""
    if not path.parent.is_dir() or path.is_dir():
        raise CascadeError(f"{path} cannot be written: name a file in a folder that exists")
    if path.parent.resolve() == out.resolve() and not path.name.startswith("_"):
        raise CascadeError(
            f"{path} lies among Parquet files, whose readers would take it for one: call it _{path.name}"
        )


def _sections(summary: "Summary", drawn: Sample, trained: Sequence[float]) -> Iterator[str]:
    bad = sum(summary.errors.values())
    speed = f"{summary.fresh} images in {summary.seconds:.1f} s, {summary.images_per_second:.1f} images a second"
    last = f"The last run: {speed}." if summary.fresh else "All were there before the last run."
    yield f"<p>Mode {html.escape(summary.mode)}. {summary.rows} rows, {bad} of them errors. {last}</p>\n"
    if summary.fresh:
        yield table(("time", "share of the run"), [(n, f"{100 * share:.1f} %") for n, share in summary.shares.items()])
    yield "<h2>Clusters</h2>\n"
    rows = []
    for k in sorted({*drawn.clusters, *range(len(trained))}):
        share, before = summary.clusters.get(k, 0.0), trained[k] if k < len(trained) else None
        numbers = ("", "") if before is None else (f"{100 * before:.1f} %", f"{100 * (share - before):+.1f}")
        rows.append((k, drawn.clusters[k], f"{100 * share:.1f} %", *numbers))
    yield table(("cluster", "images", "share", "in training", "difference"), rows)
    if summary.errors:
        yield "<h2>Errors</h2>\n"
        examples = ((kind, n, ", ".join(drawn.examples.get(kind, []))) for kind, n in summary.errors.items())
        yield table(("kind", "images", "for example"), examples)
    if drawn.points is not None and len(drawn.points) > 1:
        yield f"<h2>Embedding map</h2>\n<p>{len(drawn.points)} images, their first two principal components.</p>\n"
        yield _map(drawn)
    pictures = thumbnails(name for names in drawn.paths.values() for name in names)
    for k, number in drawn.clusters.most_common(CLUSTERS):
        yield f"<h2>Cluster {k}: {number} images</h2>\n"
        yield sheet({path: Path(path).name for path in drawn.paths[k]}, pictures)


def _map(drawn: Sample) -> str:
    assert drawn.points is not None
    dots = []
    for (x, y), (path, k) in zip(PLOT * (0.02 + 0.96 * flat(drawn.points)), drawn.of, strict=True):
        color = COLORS[k % len(COLORS)]
        dots.append(
            f'<circle cx="{x:.1f}" cy="{PLOT - y:.1f}" r="3" fill="{color}" fill-opacity="0.7">'
            f"<title>cluster {k}: {html.escape(path)}</title></circle>"
        )
    key = " ".join(
        f'<span style="color:{COLORS[k % len(COLORS)]}">&#9679;</span> {k}' for k in sorted({k for _, k in drawn.of})
    )
    body = "\n".join(dots)
    return (
        f'<svg viewBox="0 0 {PLOT} {PLOT}" width="{PLOT}" height="{PLOT}" role="img">\n{body}\n</svg>\n<p>{key}</p>\n'
    )
