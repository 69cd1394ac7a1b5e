"""Reports: the sample is uniform, pages escape what they show, and CSV cells compute nothing."""

import csv
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cascade.errors import CascadeError
from cascade.offline import report
from cascade.offline.predict import Summary


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
    monkeypatch.setattr(report, "POINTS", 100)
    path = predictions(tmp_path / "p.parquet", 200)
    kept = np.zeros(200)
    for seed in range(200):
        drawn = report.sample([path], seed)
        assert drawn.points is not None and len(drawn.points) == len(drawn.of) == 100
        kept[[int(name[:5]) for name, _ in drawn.of]] += 1
    kept /= 200
    assert kept[7] == 0 and drawn.examples == {"truncated": ["00007.png"]}
    for part in (kept[:7], kept[8:100], kept[100:105], kept[105:]):
        assert abs(part.mean() - 100 / 199) < 0.06
    assert {k: len(paths) for k, paths in drawn.paths.items()} == dict.fromkeys(range(3), report.PICTURES)


def test_the_points_belong_to_their_paths(tmp_path: Path) -> None:
    path = predictions(tmp_path / "p.parquet", 50)
    stored = np.stack(pq.read_table(path)["embedding"].to_pylist())
    drawn = report.sample([path])
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


def test_csv_cells_compute_nothing(tmp_path: Path) -> None:
    names = ["=1+1.png", "@x.png", "-a.png", "+b.png", "c.png"]
    report.write_table(pa.table({"group": [0] * 5, "path": names, "similarity": [-0.5] * 5}), tmp_path / "d.csv")
    rows = list(csv.reader((tmp_path / "d.csv").open()))
    assert [row[1] for row in rows[1:]] == ["'=1+1.png", "'@x.png", "'-a.png", "'+b.png", "c.png"]
    assert rows[1][2] == "-0.5", "numbers stay numbers"
    with pytest.raises(CascadeError, match="name a .csv or .parquet file"):
        report.write_table(pa.table({"a": [1]}), tmp_path / "d.txt")
