"""The columns of a job's output, errors between, and who else reads them."""

import os
from pathlib import Path
from shutil import copy

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import cascade
from cascade.bundle.format import Bundle, digest
from cascade.engine.engine import Engine
from cascade.engine.results import Options, Prediction
from cascade.offline.job import Embedding, files_of
from cascade.offline.predict import predict_files
from tests.helpers.deferral import two_sizes
from tests.helpers.photos import BAD, PHOTOS


def test_columns_types_and_metadata(engine: Engine, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    summary = predict_files(engine, PHOTOS[:2], out)
    schema = pq.read_schema(out)
    neighbor = pa.struct([("name", pa.string()), ("label", pa.string()), ("similarity", pa.float32())])
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
        ("neighbors", pa.list_(neighbor)),
        ("error", pa.string()),
        ("error_kind", pa.string()),
    ]
    ((name, version),) = engine.bundles
    assert (summary.bundle, summary.version) == (name, version)
    found = engine.find(name)
    assert isinstance(found, Bundle)
    assert schema.metadata == {
        b"bundle": name.encode(),
        b"version": version.encode(),
        b"mode": summary.mode.encode(),
        b"digest": digest(found).encode(),
        b"cascade": cascade.__version__.encode(),
    }


def test_embeddings_on_demand_with_errors_between(engine: Engine, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    options = Options(embedding=True, labels=1, neighbors=0)
    images = [folder / "empty.jpg", PHOTOS[0], folder / "cut.png", PHOTOS[1]]
    predict_files(engine, images, out, options, embedding="float32")
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
    assert [row for row in table["neighbors"].to_pylist() if row is not None] == [[], []]


def test_only_errors_still_make_a_file(engine: Engine, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    summary = predict_files(engine, [folder / "empty.jpg", folder / "missing.png"], out, embedding="float16")
    assert (summary.rows, summary.clusters) == (2, {})
    assert pq.read_table(out)["error_kind"].to_pylist() == ["empty", "unreadable"]


def test_names_that_are_not_utf8(engine: Engine, tmp_path: Path) -> None:
    good, bad = (Path(os.fsdecode(bytes(tmp_path / "x")[:-1] + name)) for name in (b"caf\xe9.png", b"gone\xff.png"))
    copy(PHOTOS[0], good)
    predict_files(engine, [good, bad], tmp_path / "out.parquet")
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [Path(row["path"]).name for row in rows] == [r"caf\xe9.png", r"gone\xff.png"]
    assert rows[0]["error"] is None and r"gone\xff.png" in rows[1]["error"]


@pytest.mark.parametrize("embedding", ["float16", "float32"])
def test_others_read_it(engine: Engine, folder: Path, tmp_path: Path, embedding: Embedding) -> None:
    """pandas, DuckDB and datasets, each over the whole folder, errors and all."""
    import datasets  # type: ignore[import-untyped]
    import duckdb
    import pandas

    out = tmp_path / "out"
    predict_files(engine, [folder], out, rows=6, embedding=embedding)
    want = [row for path in files_of(out) for row in pq.read_table(path).to_pylist()]
    vectors = [row["embedding"] for row in want]
    frame = pandas.read_parquet(out)
    assert frame["path"].tolist() == [row["path"] for row in want]
    assert frame["error_kind"].notna().sum() == len(BAD)
    query = "select path, embedding, cluster from read_parquet(?) order by path"
    found = duckdb.execute(query, [f"{out}/*.parquet"]).fetchall()
    by_path = sorted(want, key=lambda row: row["path"])
    assert [(path, cluster) for path, _, cluster in found] == [(row["path"], row["cluster"]) for row in by_path]
    for (_, vector, _), row in zip(found, by_path, strict=True):
        assert (vector is None) == (row["embedding"] is None)
        if vector is not None:
            np.testing.assert_array_equal(np.array(vector, np.float32), np.array(row["embedding"], np.float32))
    loaded = datasets.load_dataset(
        "parquet", data_files=f"{out}/*.parquet", split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded["path"][:] == [row["path"] for row in want]
    assert [v is None for v in loaded["embedding"][:]] == [v is None for v in vectors]


def test_two_input_sizes_have_columns_of_their_own(cifar: list[Image.Image], tmp_path: Path) -> None:
    engine = Engine()
    engine.add(two_sizes(cifar[:20], threshold=1.0))
    out = tmp_path / "out.parquet"
    summary = predict_files(engine, [*PHOTOS[:2], tmp_path / "gone.png"], out)
    rows = pq.read_table(out, columns=["mode", "input_size", "deferred"]).to_pydict()
    assert rows == {"mode": ["adaptive"] * 2 + [None], "input_size": [64, 64, None], "deferred": [True, True, None]}
    assert summary.deferred == 1.0 and summary.mode == "adaptive"
    fast = predict_files(engine, PHOTOS[:2], tmp_path / "fast.parquet", Options(mode="fast"))
    assert fast.deferred == 0.0
    plain = predict_files(engine, PHOTOS[:2], tmp_path / "plain.parquet", Options(mode="dispatcher"))
    assert plain.deferred is None and "deferred" not in pq.read_schema(tmp_path / "plain.parquet").names
