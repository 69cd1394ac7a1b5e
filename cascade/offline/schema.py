"""Answers as rows of Parquet: the columns, and counts over finished files."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cascade import __version__
from cascade.engine.results import AUTO, INPUT_MODES, ItemError, Prediction
from cascade.offline.job import Job

if TYPE_CHECKING:
    import pyarrow as pa

Answer = Prediction | ItemError


def schema(job: Job) -> "pa.Schema":
    """The columns in order. In a row with an error, all but ``path``, ``error`` and ``error_kind`` are null.

    For the bundle ``auto``, ``bundle`` and ``bundle_confidence`` tell where an image was sent.
    """
    import pyarrow as pa

    label = pa.struct({"name": pa.string(), "score": pa.float32()})
    neighbor = pa.struct({"name": pa.string(), "label": pa.string(), "similarity": pa.float32()})
    columns = {
        "path": pa.string(),
        "bundle": pa.string(),
        "version": pa.string(),
        "mode": pa.string(),
        "cluster": pa.int64(),
        "confidence": pa.float32(),
        "ood": pa.float32(),
        "masks": pa.list_(pa.string()),
        "labels": pa.list_(label),
        "neighbors": pa.list_(neighbor),
        "error": pa.string(),
        "error_kind": pa.string(),
    }
    if job.bundle == AUTO:
        columns["bundle_confidence"] = pa.float32()
    if job.mode in INPUT_MODES or job.bundle == AUTO:
        columns |= {"input_size": pa.int32(), "deferred": pa.bool_()}
    if job.embedding != "none":
        number = pa.float16() if job.embedding == "float16" else pa.float32()
        columns["embedding"] = pa.list_(number, job.dim)
    written_by = {"bundle": job.bundle, "version": job.version, "mode": job.mode, "digest": job.digest}
    return pa.schema(columns, metadata=written_by | {"cascade": __version__})


def rows_of(job: Job, keys: Sequence[str], answers: Sequence[Answer]) -> "pa.Table":
    """Answers as rows of ``schema(job)``."""
    import pyarrow as pa

    kinds = schema(job)
    rows: list[dict[str, Any]] = []
    for key, answer in zip(keys, answers, strict=True):
        row: dict[str, Any] = {"path": _text(key)}
        if isinstance(answer, ItemError):
            rows.append(row | {"error": _text(answer.message), "error_kind": answer.kind})
        else:
            values = answer.to_json()
            sure = {} if answer.dispatch is None else {"bundle_confidence": answer.dispatch.confidence}
            rows.append(row | values | values.get("deferral", {}) | sure)
    columns = [
        _embeddings(job, answers)
        if field.name == "embedding"
        else pa.array([row.get(field.name) for row in rows], field.type)
        for field in kinds
    ]
    return pa.Table.from_arrays(columns, schema=kinds)


def deferred_share(paths: Iterable[Path]) -> float | None:
    """Share of the answers in a job's Parquet files that came from a second pass; None in modes without one."""
    import pyarrow.parquet as pq

    tables = [pq.read_table(path, columns=["deferred"]) for path in paths if "deferred" in pq.read_schema(path).names]
    flags = [flag for table in tables for flag in table["deferred"].drop_null().to_pylist()]
    return sum(flags) / len(flags) if flags else None


def bundle_shares(paths: Iterable[Path]) -> dict[str, float]:
    """Share of each bundle among the answers in a job's Parquet files, largest first."""
    import pyarrow.parquet as pq

    bundles: Counter[str] = Counter()
    for path in paths:
        bundles.update(pq.read_table(path, columns=["bundle"])["bundle"].drop_null().to_pylist())
    return {name: number / bundles.total() for name, number in bundles.most_common()}


def count(paths: Iterable[Path]) -> tuple[int, dict[str, int], dict[int, float]]:
    """Rows, errors by kind (most frequent first) and the share of each cluster in Parquet files of a job."""
    import pyarrow.parquet as pq

    errors: Counter[str] = Counter()
    clusters: Counter[int] = Counter()
    rows = 0
    for path in paths:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(columns=["cluster", "error_kind"]):
                rows += batch.num_rows
                errors.update(each.as_py() for each in batch.column("error_kind").drop_null())
                clusters.update(each.as_py() for each in batch.column("cluster").drop_null())
    return rows, dict(errors.most_common()), {k: n / clusters.total() for k, n in sorted(clusters.items())}


def _embeddings(job: Job, answers: Sequence[Answer]) -> "pa.Array":
    """Embeddings as a fixed-size list, null for errors."""
    import pyarrow as pa

    kind = np.float16 if job.embedding == "float16" else np.float32
    values = np.zeros((len(answers), job.dim), kind)
    missing = np.ones(len(answers), bool)
    for row, each in enumerate(answers):
        if isinstance(each, Prediction):
            values[row], missing[row] = each.embedding, False
    flat = pa.array(values.reshape(-1))
    return pa.FixedSizeListArray.from_arrays(
        flat, type=pa.list_(pa.from_numpy_dtype(kind), job.dim), mask=pa.array(missing)
    )


def _text(name: str) -> str:
    r"""A file name as UTF-8 for Parquet; other bytes, which Linux allows, become ``\xff``."""
    return os.fsencode(name).decode(errors="backslashreplace")
