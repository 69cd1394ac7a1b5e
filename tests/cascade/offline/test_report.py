"""Reports: the sample is uniform, pages escape what they show, and CSV cells compute nothing."""

import csv
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cascade.errors import CascadeError
from cascade.offline import report, sample
from cascade.offline.predict import Summary
from handlers.asgi import ui


def predictions(path: Path, rows: int, dim: int = 2) -> Path:
    """A Parquet file as ``cascade predict`` writes it, as far as a report reads it."""
    embeddings = np.random.default_rng(0).normal(size=(rows, dim)).astype(np.float16)
    columns = {
        "path": [f"{row:05d}.png" for row in range(rows)],
        "cluster": [None if row == 7 else row % 3 for row in range(rows)],
        "error_kind": ["truncated" if row == 7 else None for row in range(rows)],
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(embeddings.reshape(-1)), dim),
    }
    pq.write_table(pa.table(columns), path)
    return path


def test_each_row_is_as_likely_as_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that come while the sample is being filled for the first time."""
    monkeypatch.setattr(sample, "POINTS", 100)
    path = predictions(tmp_path / "p.parquet", 200)
    kept = np.zeros(200)
    for seed in range(200):
        drawn = sample.sample([path], seed)
        assert drawn.points is not None and len(drawn.points) == len(drawn.of) == 100
        kept[[int(name[:5]) for name, _ in drawn.of]] += 1
    kept /= 200
    assert kept[7] == 0 and drawn.examples == {"truncated": ["00007.png"]}
    for part in (kept[:7], kept[8:100], kept[100:105], kept[105:]):
        assert abs(part.mean() - 100 / 199) < 0.06
    assert {k: len(paths) for k, paths in drawn.paths.items()} == dict.fromkeys(range(3), sample.PICTURES)


def test_the_points_belong_to_their_paths(tmp_path: Path) -> None:
    path = predictions(tmp_path / "p.parquet", 50)
    stored = np.stack(pq.read_table(path)["embedding"].to_pylist())
    drawn = sample.sample([path])
    assert drawn.points is not None
    for (name, cluster), point in zip(drawn.of, drawn.points, strict=True):
        assert cluster == int(name[:5]) % 3 and np.allclose(stored[int(name[:5])], point)


def test_a_page_escapes_names(tmp_path: Path) -> None:
    summary = Summary("<b>", "1", "dispatcher", 50, {"<i>": 1}, {0: 1.0}, 50, 2.0, (0.5, 0.5), {"forward": 0.25})
    report.write(summary, [predictions(tmp_path / "p.parquet", 50)], summary.trained, tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "<b>" not in page and "&lt;b&gt;/1: 50 images" in page and "<i>" not in page
    assert "25.0 images a second" in page and "25.0 %" in page and "+50.0" in page
    assert page.count("<circle") == 49


@pytest.mark.parametrize(("rows", "dots"), [(9, 8), (8, 0)])
def test_few_images_have_no_map_but_outliers(tmp_path: Path, rows: int, dots: int) -> None:
    """One of the rows is an error."""
    summary = Summary("one", "1", "dispatcher", rows, {}, {0: 1.0}, rows, 2.0, (0.5, 0.5), {"forward": 0.25})
    report.write(summary, [predictions(tmp_path / "p.parquet", rows)], summary.trained, tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert page.count("<circle") == dots and ("Embedding map" in page) == bool(dots)
    assert f"Of {rows - 1} random images" in page and "<h2>Outliers</h2>" in page


def test_near_duplicates_and_outliers_of_a_sample() -> None:
    generator = np.random.default_rng(0)
    points = generator.normal(size=(60, 8)).astype(np.float32) + [6, 0, 0, 0, 0, 0, 0, 0]
    points[[3, 30, 50]] = points[3] * [[1], [2], [1.001]]
    points[[7, 8]] = points[7]
    points[20] = [-9, 0, 0, 0, 0, 0, 0, 1]
    groups = sample.near_duplicates(points, 0.9999)
    assert [group.tolist() for group in groups] == [[3, 30, 50], [7, 8]]
    (first, distance), *rest = sample.outliers(points, 5)
    assert first == 20 and distance > 1.5 and len(rest) == 4
    assert [d for _, d in rest] == sorted((d for _, d in rest), reverse=True) and rest[0][1] < 1
    assert sample.outliers(points[:2], 5)[0][1] >= 0


def test_pages_look_like_the_page_of_the_server(tmp_path: Path) -> None:
    """One style for both, in the file itself; duplicates and outliers are listed."""
    summary = Summary("one", "1", "dispatcher", 50, {}, {0: 1.0}, 50, 2.0, (0.5, 0.5), {"forward": 0.25})
    report.write(summary, [predictions(tmp_path / "p.parquet", 50)], summary.trained, tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert ui.STYLE.read_text().strip() in page and "prefers-color-scheme: dark" in page
    assert "<h2>Near-duplicates</h2>" in page and "<h2>Outliers</h2>" in page
    outlying = page.partition("<h2>Outliers</h2>")[2]
    assert outlying.count("<figure") == report.FAR and "not readable" in outlying


def test_csv_cells_compute_nothing(tmp_path: Path) -> None:
    names = ["=1+1.png", "@x.png", "-a.png", "+b.png", "c.png"]
    report.write_table(pa.table({"group": [0] * 5, "path": names, "similarity": [-0.5] * 5}), tmp_path / "d.csv")
    rows = list(csv.reader((tmp_path / "d.csv").open()))
    assert [row[1] for row in rows[1:]] == ["'=1+1.png", "'@x.png", "'-a.png", "'+b.png", "c.png"]
    assert rows[1][2] == "-0.5", "numbers stay numbers"
    with pytest.raises(CascadeError, match="name a .csv or .parquet file"):
        report.write_table(pa.table({"a": [1]}), tmp_path / "d.txt")
