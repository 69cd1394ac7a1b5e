"""Offline prediction: every file one row, in order, and a file that is whole or not there."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from shutil import copy
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import cascade
from cascade import batch
from cascade.batch import find, predict_files
from cascade.engine import Engine
from cascade.errors import CascadeError
from cascade.prediction import Options, Prediction

PHOTOS = sorted((Path(__file__).parents[1] / "data" / "photos").glob("*.png"))


@pytest.fixture(scope="module")
def engine(bundle_path: Path) -> Engine:
    return cascade.load(bundle_path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten real images and whatever goes wrong in real folders."""
    folder = tmp_path / "images"
    (folder / "nested" / "deeper").mkdir(parents=True)
    for i, photo in enumerate(PHOTOS):
        copy(photo, (folder, folder / "nested", folder / "nested" / "deeper")[i % 3])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpeg").write_text("no image")
    (folder / "cut.png").write_bytes(PHOTOS[0].read_bytes()[:200])
    Image.open(PHOTOS[0]).save(folder / "other.gif")
    (folder / "broken.png").symlink_to(folder / "gone.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    os.mkfifo(folder / "pipe.webp")
    (folder / "notes.txt").write_text("not searched for")
    return folder


BAD = {
    "empty.jpg": "empty",
    "text.jpeg": "not_an_image",
    "cut.png": "truncated",
    "other.gif": "not_an_image",
    "broken.png": "unreadable",
    "loop.png": "unreadable",
    "pipe.webp": "unreadable",
}


def leftovers(out: Path) -> list[str]:
    return [path.name for path in out.parent.iterdir() if path != out and path.name != "images"]


def workers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("cascade-batch")]


# What sources mean


def test_a_folder_is_searched_to_any_depth_and_sorted(folder: Path) -> None:
    found = find([folder])
    assert len(found) == len(PHOTOS) + len(BAD)
    assert found == sorted(found) and found == find([str(folder)])
    assert folder / "notes.txt" not in found and folder / "broken.png" in found


def test_sources_keep_their_order_and_files_stand_for_themselves(folder: Path) -> None:
    sources = [folder / "notes.txt", folder / "nested", folder / "missing.png", PHOTOS[0]]
    found = find(sources)
    assert found[0] == folder / "notes.txt" and found[-2:] == [folder / "missing.png", PHOTOS[0]]


def test_patterns(folder: Path) -> None:
    assert find([folder / "*.gif"]) == [folder / "other.gif"]
    assert len(find([folder / "**" / "*-0*.png"])) == len(PHOTOS)
    nested = find([folder / "nest*"])
    assert nested == find([folder / "nested"]) and len(nested) == len(set(nested)) > 3


def test_a_name_that_looks_like_a_pattern(tmp_path: Path) -> None:
    odd = tmp_path / "cat[1].png"
    copy(PHOTOS[0], odd)
    assert find([odd]) == [odd]


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    copy(PHOTOS[0], real / "a.png")
    top = tmp_path / "top"
    top.mkdir()
    (top / "link").symlink_to(real)
    (real / "up").symlink_to(real)  # a cycle
    assert find([top]) == [top / "link" / "a.png"]


def test_a_folder_that_cannot_be_listed_is_not_lost(
    engine: Engine, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir = os.scandir

    def denied(path: str) -> Any:
        if Path(path).name == "deeper":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)  # chmod does not stop root
    summary = predict_files(engine, [folder / "nested"], tmp_path / "out.parquet")
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["path"] for row in rows if row["error_kind"] == "unreadable"] == [str(folder / "nested" / "deeper")]
    assert summary.errors == {"unreadable": 1}


@pytest.mark.parametrize("source", ["nothing", "nothing/*.png", "nothing/x/**"])
def test_no_images_says_what_to_do(tmp_path: Path, source: str) -> None:
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "notes.txt").write_text("no image")
    with pytest.raises(CascadeError, match="nothing.* has no images: name image files"):
        find([PHOTOS[0], tmp_path / source])
    with pytest.raises(CascadeError, match="give files, folders or patterns"):
        find([])


# The file


@pytest.mark.parametrize(("size", "threads"), [(3, 2), (64, 1), (1, 4)])
def test_every_source_is_one_row_in_order(
    engine: Engine, folder: Path, tmp_path: Path, size: int, threads: int
) -> None:
    out = tmp_path / "out.parquet"
    summary = predict_files(engine, [folder, PHOTOS[3]], out, batch=size, threads=threads)
    rows = pq.read_table(out).to_pylist()
    paths = find([folder, PHOTOS[3]])
    assert [row["path"] for row in rows] == [str(path) for path in paths]
    assert {Path(row["path"]).name: row["error_kind"] for row in rows if row["error_kind"]} == BAD
    for path, row in zip(paths, rows, strict=True):
        (alone,) = engine.predict([path])
        if row["error"]:
            assert not isinstance(alone, Prediction) and row["error"] == alone.message
            assert all(v is None for k, v in row.items() if k not in ("path", "error", "error_kind"))
            continue
        assert isinstance(alone, Prediction) and row["error_kind"] is None
        assert (row["bundle"], row["version"], row["mode"]) == (alone.bundle, alone.version, alone.mode)
        assert (row["cluster"], tuple(row["masks"])) == (alone.cluster, alone.masks)
        assert row["confidence"] == pytest.approx(alone.confidence, abs=1e-4)
        assert row["ood"] == pytest.approx(alone.ood, abs=1e-3)
        assert [label["name"] for label in row["labels"]] == [label.name for label in alone.labels]
        scores = [label.score for label in alone.labels]
        assert [label["score"] for label in row["labels"]] == pytest.approx(scores, abs=1e-3)
        found = [(near["name"], near["label"]) for near in row["neighbours"]]
        assert found == [(near.name, near.label) for near in alone.neighbours]
    assert summary.rows == len(rows) and sum(summary.errors.values()) == len(BAD)
    assert summary.errors == {"unreadable": 3, "not_an_image": 2, "truncated": 1, "empty": 1}
    clusters = [row["cluster"] for row in rows if row["cluster"] is not None]
    assert summary.clusters == {k: clusters.count(k) / len(clusters) for k in sorted(set(clusters))}
    assert summary.images_per_second == pytest.approx(len(rows) / summary.seconds)
    assert leftovers(out) == [] and workers() == []


def test_columns_types_and_metadata(engine: Engine, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    summary = predict_files(engine, PHOTOS[:2], out)
    schema = pq.read_schema(out)
    neighbour = pa.struct([("name", pa.string()), ("label", pa.string()), ("similarity", pa.float32())])
    assert [(field.name, field.type) for field in schema] == [
        ("path", pa.string()),
        ("bundle", pa.string()),
        ("version", pa.string()),
        ("mode", pa.string()),
        ("cluster", pa.int64()),
        ("confidence", pa.float32()),
        ("ood", pa.float32()),
        ("masks", pa.list_(pa.string())),
        ("labels", pa.list_(pa.struct([("name", pa.string()), ("score", pa.float32())]))),
        ("neighbours", pa.list_(neighbour)),
        ("error", pa.string()),
        ("error_kind", pa.string()),
    ]
    ((name, version),) = engine.bundles
    assert (summary.bundle, summary.version) == (name, version)
    assert schema.metadata == {
        b"bundle": name.encode(),
        b"version": version.encode(),
        b"mode": summary.mode.encode(),
        b"cascade": cascade.__version__.encode(),
    }


def test_embeddings_on_demand_with_errors_between(engine: Engine, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    options = Options(embedding=True, labels=1, neighbours=0)
    predict_files(engine, [folder / "empty.jpg", PHOTOS[0], folder / "cut.png", PHOTOS[1]], out, options)
    table = pq.read_table(out)
    (alone, other) = engine.predict(PHOTOS[:2], options)
    assert isinstance(alone, Prediction) and isinstance(other, Prediction)
    assert alone.embedding is not None and other.embedding is not None
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), len(alone.embedding))
    found = table["embedding"].to_pylist()
    assert found[0] is None and found[2] is None
    np.testing.assert_allclose(found[1], alone.embedding, atol=1e-3)
    np.testing.assert_allclose(found[3], other.embedding, atol=1e-3)
    assert {len(row) for row in table["labels"].to_pylist() if row is not None} <= {0, 1}
    assert [row for row in table["neighbours"].to_pylist() if row is not None] == [[], []]


def test_only_errors_still_make_a_file(engine: Engine, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    summary = predict_files(engine, [folder / "empty.jpg", folder / "missing.png"], out, Options(embedding=True))
    assert (summary.rows, summary.clusters) == (2, {})
    assert pq.read_table(out)["error_kind"].to_pylist() == ["empty", "unreadable"]


def test_rows_stream_out_in_groups(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "ROW_GROUP", 4)
    predict_files(engine, PHOTOS, tmp_path / "out.parquet", batch=2)
    file = pq.ParquetFile(tmp_path / "out.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [4, 4, 2]


def test_names_that_are_not_utf8(engine: Engine, tmp_path: Path) -> None:
    good, bad = (Path(os.fsdecode(bytes(tmp_path / "x")[:-1] + name)) for name in (b"caf\xe9.png", b"gone\xff.png"))
    copy(PHOTOS[0], good)
    predict_files(engine, [good, bad], tmp_path / "out.parquet")
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [Path(row["path"]).name for row in rows] == [r"caf\xe9.png", r"gone\xff.png"]
    assert rows[0]["error"] is None and r"gone\xff.png" in rows[1]["error"]


# Failure leaves nothing


def failing_after(engine: Engine, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    predict, done = engine.predict, iter(range(calls))

    def fail(images: Sequence[Any], options: Options) -> Any:
        if next(done, None) is None:
            raise RuntimeError("out of memory")
        return predict(images, options)

    monkeypatch.setattr(engine, "predict", fail)


def test_a_failure_leaves_the_old_file_and_nothing_else(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.parquet"
    out.write_text("of last week")
    failing_after(engine, 2, monkeypatch)
    with pytest.raises(RuntimeError, match="out of memory"):
        predict_files(engine, PHOTOS, out, batch=2)
    assert out.read_text() == "of last week" and leftovers(out) == [] and workers() == []


def test_ctrl_c_leaves_nothing(engine: Engine, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"

    def interrupt(done: int, total: int) -> None:
        if done >= 4:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        predict_files(engine, PHOTOS, out, batch=2, progress=interrupt)
    assert list(tmp_path.iterdir()) == [] and workers() == []


def test_a_full_disk_is_one_line(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(CascadeError, match="No space left on device.*make room"):
        predict_files(engine, PHOTOS, tmp_path / "out.parquet")
    assert list(tmp_path.iterdir()) == [] and workers() == []


def test_the_file_replaces_an_older_one(engine: Engine, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    out.write_text("of last week")
    predict_files(engine, PHOTOS[:1], out)
    assert pq.read_table(out).num_rows == 1 and leftovers(out) == []


@pytest.mark.parametrize("out", ["", "missing/out.parquet"])
def test_out_must_be_a_file_in_a_folder(engine: Engine, tmp_path: Path, out: str) -> None:
    with pytest.raises(CascadeError, match="name a file in a folder that exists"):
        predict_files(engine, PHOTOS, tmp_path / out)


@pytest.mark.parametrize(
    "options", [Options(bundle="unheard-of"), Options(version="999"), Options(mode="sideways")], ids=str
)
def test_unknown_options_stop_before_any_work(engine: Engine, tmp_path: Path, options: Options) -> None:
    with pytest.raises(CascadeError, match="no such|has no mode"):
        predict_files(engine, PHOTOS, tmp_path / "out.parquet", options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("numbers", [{"batch": 0}, {"threads": 0}])
def test_numbers_must_be_positive(engine: Engine, tmp_path: Path, numbers: dict[str, int]) -> None:
    with pytest.raises(CascadeError, match="at least 1"):
        predict_files(engine, PHOTOS, tmp_path / "out.parquet", **numbers)  # type: ignore[arg-type]


# On the way


def test_look_ahead_is_bounded(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the first batch is being written no more than ``threads`` others are taken up."""
    predict, started, written = engine.predict, count(1), [0]
    ahead: list[int] = []

    def counted(images: Sequence[Any], options: Options) -> Any:
        ahead.append(next(started) - written[0])
        return predict(images, options)

    def slow(done: int, total: int) -> None:
        written[0] = done
        time.sleep(0.05)

    monkeypatch.setattr(engine, "predict", counted)
    predict_files(engine, PHOTOS, tmp_path / "out.parquet", batch=1, threads=2, progress=slow)
    assert len(ahead) == len(PHOTOS)
    assert 2 <= max(ahead) <= 3


def test_progress_counts_up_to_the_total(engine: Engine, folder: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    summary = predict_files(engine, [folder], tmp_path / "out.parquet", batch=4, progress=lambda *n: told.append(n))
    assert told[0] == (0, summary.rows) and told[-1] == (summary.rows, summary.rows)
    assert [done for done, _ in told] == sorted({done for done, _ in told})


def test_bar_shows_count_and_rate(capfd: pytest.CaptureFixture[str]) -> None:
    with batch.bar("predict") as advance:
        advance(0, 20)
        advance(20, 20)
    shown = capfd.readouterr().err
    assert "20/20" in shown and "images/s" in shown


def test_import_stays_light() -> None:
    heavy = ["torch", "timm", "pyarrow", "rich", "faiss"]
    code = f"import sys, cascade.batch, cascade.images; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr
