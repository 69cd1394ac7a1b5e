"""Offline prediction: every image one row, in order, in files that are whole or not there."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cascade.bundle.format import write
from cascade.engine.engine import Engine
from cascade.engine.results import Options, Prediction
from cascade.errors import CascadeError
from cascade.offline import predict
from cascade.offline.job import files_of
from cascade.offline.predict import predict_files, settle, table
from cascade.offline.sources import expand, plan, read
from tests.helpers.bundles import handmade
from tests.helpers.paths import ROOT
from tests.helpers.photos import BAD, PHOTOS

pytestmark = pytest.mark.slow


def leftovers(out: Path) -> list[str]:
    return [path.name for path in out.parent.iterdir() if path != out and path.name != "images"]


def workers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("cascade-batch")]


# The file


@pytest.mark.parametrize(("size", "threads"), [(3, 2), (64, 1), (1, 4)])
def test_every_source_is_one_row_in_order(
    engine: Engine, folder: Path, tmp_path: Path, size: int, threads: int
) -> None:
    out = tmp_path / "out.parquet"
    summary = predict_files(engine, [folder, PHOTOS[3]], out, batch=size, threads=threads)
    rows = pq.read_table(out).to_pylist()
    paths = [*map(Path, expand(str(folder))), PHOTOS[3]]
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
        found = [(near["name"], near["label"]) for near in row["neighbors"]]
        assert found == [(near.name, near.label) for near in alone.neighbors]
    assert summary.rows == len(rows) and sum(summary.errors.values()) == len(BAD)
    assert summary.errors == {"unreadable": 3, "not_an_image": 2, "truncated": 1, "empty": 1}
    clusters = [row["cluster"] for row in rows if row["cluster"] is not None]
    assert summary.clusters == {k: clusters.count(k) / len(clusters) for k in sorted(set(clusters))}
    assert summary.images_per_second == pytest.approx(len(rows) / summary.seconds)
    assert summary.fresh == len(rows) and 0 < summary.shares["forward"] < 1 and 0 < summary.shares["decode"] < 1
    assert leftovers(out) == [] and workers() == []


# Failure


def failing_after(engine: Engine, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run, done = engine.run, iter(range(calls))

    def fail(items: Sequence[Any]) -> Any:
        if next(done, None) is None:
            raise RuntimeError("out of memory")
        return run(items)

    monkeypatch.setattr(engine, "run", fail)


def test_a_failure_leaves_the_old_file_and_what_is_done(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.parquet"
    out.write_text("of last week")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        failing_after(engine, 3, patch)
        predict_files(engine, PHOTOS, out, batch=2, rows=4)
    assert out.read_text() == "of last week" and leftovers(out) == ["out.parquet.parts"] and workers() == []
    assert sorted(os.listdir(tmp_path / "out.parquet.parts")) == ["_job.json", "_units.jsonl", "part-00000.parquet"]
    summary = predict_files(engine, PHOTOS, out, batch=2, rows=4)
    assert (summary.rows, summary.fresh) == (10, 6) and leftovers(out) == []


def test_ctrl_c_leaves_what_is_done(engine: Engine, tmp_path: Path) -> None:
    def interrupt(done: int, total: int | None) -> None:
        if done >= 6:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        predict_files(engine, PHOTOS, tmp_path / "out", batch=2, rows=4, progress=interrupt)
    assert sorted(os.listdir(tmp_path / "out")) == ["_job.json", "_units.jsonl", "part-00000.parquet"]
    assert workers() == []


def test_a_full_disk_is_one_line(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(CascadeError, match="No space left on device.*free disk space"):
        predict_files(engine, PHOTOS, tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["_job.json", "_units.jsonl"] and workers() == []


KILLED = """
import os, sys, threading, time
from pathlib import Path
import pyarrow.parquet  # here, or every child would
import cascade
from cascade.offline import predict

bundle, images, out, log = map(Path, sys.argv[1:])
engine = cascade.load(bundle)
prepare, replace = predict.prepare, Path.replace


def die(*_):
    os.kill(os.getpid(), 9)


def logged(engine, job, load):
    with log.open("a") as file:
        file.write(f"{run} {load.args[0]}\\n")
    return prepare(engine, job, load)


def before(self, target):
    if target.name == "part-00002.parquet":
        die()
    return replace(self, target)


def after(self, target):
    replace(self, target)
    if target.name == "part-00003.parquet":
        die()


def at(seconds):
    return lambda: threading.Timer(seconds, die).start()


def renaming(how):
    return lambda: setattr(Path, "replace", how)


predict.prepare = logged
ends = [at(0.1), at(0.3), renaming(before), at(0.2), renaming(after), lambda: None]
for run, end in enumerate(ends):
    done = sorted(path.name for path in out.glob("part-*"))
    with log.open("a") as file:
        file.write(f"{run} done {len(done)}\\n")
    child = os.fork()  # loading costs seconds, and no thread runs yet
    if child == 0:
        end()
        predict.predict_files(engine, [images], out, embedding="float16", batch=4, threads=2, rows=8)
        os._exit(0)
    print(os.waitpid(child, 0)[1])
"""


def test_killed_at_any_moment_no_row_is_lost_or_twice(
    cifar: list[Image.Image], cifar_folder: Path, tmp_path: Path
) -> None:
    """SIGKILL at five moments, two of them right before and right after a part gets its name."""
    images, out, log = cifar_folder / "test", tmp_path / "out", tmp_path / "log"
    bundle = write(handmade(cifar[:40]), tmp_path / "hand" / "1")
    command = [sys.executable, "-c", KILLED, *map(str, (bundle, images, out, log))]
    root = str(ROOT)
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=os.environ | {"PYTHONPATH": root})
    ends = [int(line) for line in done.stdout.split()]
    assert len(ends) == 6 and ends[-1] == 0, done.stderr
    assert ends[2] == ends[4] == signal.SIGKILL
    rows = [row for path in sorted(out.glob("part-*")) for row in pq.read_table(path).to_pylist()]
    assert [row["path"] for row in rows] == list(expand(str(images))) and len(rows) == 60
    assert not any(row["error"] for row in rows)
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []
    finished: list[int] = []
    for line in log.read_text().splitlines():
        run, first, *rest = line.split(" ")
        if first == "done":
            finished.append(int(rest[0]))
        else:  # parts are made in order: image n is of part n // 8
            assert list(expand(str(images))).index(first) // 8 >= finished[int(run)], "read again"
    assert finished == sorted(finished) and finished[-1] >= 4


def test_a_folder_of_parts_and_again(engine: Engine, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = predict_files(engine, [folder], out, rows=5, batch=2, embedding="float16")
    assert [pq.read_metadata(path).num_rows for path in files_of(out)] == [5, 5, 5, 2]
    assert len({pq.read_schema(path).to_string() for path in files_of(out)}) == 1
    stamps = {path: path.stat().st_mtime_ns for path in files_of(out)}
    again = predict_files(engine, [folder], out, rows=5, embedding="float16")
    assert (again.fresh, again.rows, again.errors) == (0, first.rows, first.errors)
    assert again.clusters == first.clusters and stamps == {p: p.stat().st_mtime_ns for p in stamps}
    files_of(out)[1].unlink()  # whoever wants a part anew deletes it
    assert predict_files(engine, [folder], out, rows=5, embedding="float16").fresh == 5


def test_a_large_batch_goes_in_pieces(engine: Engine, cifar: list[Image.Image]) -> None:
    """More images than an executor gets at a time: the same answers, in order, each mask swapped in once."""
    options, before = Options(embedding=True), engine.stats()
    large = engine.predict(cifar[:75], options)
    asked = [engine.stats()[name] - before[name] for name in ("hits", "misses")]
    assert sum(asked) <= 5  # the plain trunk, dispatcher, three experts
    small = [each for first in range(0, 75, 15) for each in engine.predict(cifar[first : first + 15], options)]
    for one, other in zip(large, small, strict=True):
        assert isinstance(one, Prediction) and isinstance(other, Prediction)
        assert (one.cluster, one.masks) == (other.cluster, other.masks)
        np.testing.assert_allclose(one.embedding, other.embedding, atol=1e-3)  # type: ignore[arg-type]


def test_table_is_what_the_job_writes(engine: Engine, folder: Path, tmp_path: Path) -> None:
    """The part that a job on many machines is made of."""
    (unit,) = plan([folder])
    job = settle(engine, [folder], Options(), "float16")
    got = table(engine, job, read(unit))
    predict_files(engine, [folder], tmp_path / "out", embedding="float16")
    want = pq.read_table(files_of(tmp_path / "out")[0])
    assert got.schema.metadata == want.schema.metadata and got.cast(want.schema).schema == want.schema
    for mine, theirs in zip(got.to_pylist(), want.to_pylist(), strict=True):
        assert (mine["path"], mine["cluster"], mine["error"]) == (theirs["path"], theirs["cluster"], theirs["error"])
    assert table(engine, job, []).num_rows == 0


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
    """While a batch is being written no more than three others are taken up: passed, in a pass, decoded."""
    prepare, started, written = predict.prepare, count(1), [0]
    ahead: list[int] = []

    def counted(*arguments: Any) -> Any:
        ahead.append(next(started) - written[0])
        return prepare(*arguments)

    def slow(done: int, total: int | None) -> None:
        written[0] = done
        time.sleep(0.05)

    monkeypatch.setattr(predict, "prepare", counted)
    predict_files(engine, PHOTOS, tmp_path / "out.parquet", batch=1, threads=2, progress=slow)
    assert len(ahead) == len(PHOTOS)
    assert 2 <= max(ahead) <= 5


def test_progress_counts_up_to_the_total(engine: Engine, folder: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int | None]] = []
    summary = predict_files(engine, [folder], tmp_path / "out.parquet", batch=4, progress=lambda *n: told.append(n))
    assert told[0] == (0, summary.rows) and told[-1] == (summary.rows, summary.rows)
    assert [done for done, _ in told] == sorted({done for done, _ in told})


def test_import_stays_light() -> None:
    heavy = ["torch", "timm", "pyarrow", "rich", "faiss"]
    modules = "cascade.offline.predict, cascade.model.preprocessing"
    code = f"import sys, {modules}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr
