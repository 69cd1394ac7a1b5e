"""Graphs exported by a child process are those of this process; if the child fails, this process exports them."""

import logging
from pathlib import Path

import numpy as np
import psutil
import pytest

from cascade.engine.executors import graph_process, onnx
from cascade.engine.executors.onnx import OnnxExecutor
from cascade.engine.weight_cache import WeightCache
from tests.helpers.networks import calibrated, features, images, masks_of

pytest.importorskip("onnxruntime")


def executor_in(cache: Path, monkeypatch: pytest.MonkeyPatch) -> OnnxExecutor:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return OnnxExecutor(calibrated("test_resnet"), WeightCache(2**30))


@pytest.mark.slow
def test_the_child_makes_the_same_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of the same bytes, with the constants that no mask changes."""
    name = "test_vit"
    backbone = calibrated(name)
    (mask,) = masks_of(backbone, 2)
    x = images(backbone, 3)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "here"))
    executor = OnnxExecutor(calibrated(name), WeightCache(2**30))
    executor.prepare([mask], x.shape[-1])
    wanted = features(executor, mask, x, 2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "child"))
    monkeypatch.setattr(graph_process, "SECONDS", 900.0)  # on cores that others keep busy, too
    executor = OnnxExecutor(calibrated(name), WeightCache(2**30))
    executor.export([mask], x.shape[-1])
    monkeypatch.setattr(onnx, "made", None)  # all are there
    executor.prepare([mask], x.shape[-1])
    np.testing.assert_array_equal(features(executor, mask, x, 2), wanted)
    here, child = ({p.name: p.read_bytes() for p in (tmp_path / n).rglob("*.safetensors")} for n in ("here", "child"))
    assert here == child and len(here) == 3 and not caplog.records


@pytest.mark.parametrize(
    ("script", "seconds", "why"),
    [
        (f"until [ $(nice) -ge {graph_process.NICE} ]; do sleep 0.01; done; exit 3", 60.0, "ended with 3"),
        ("exec sleep 60", 0.1, "more than 0.1 s"),
    ],
)
def test_a_child_that_fails_costs_an_export_here(
    script: str,
    seconds: float,
    why: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o700)
    executor = executor_in(tmp_path, monkeypatch)
    (mask,) = masks_of(executor.backbone, 2)
    monkeypatch.setattr(graph_process, "SECONDS", seconds)
    monkeypatch.setattr(graph_process.sys, "executable", str(program))
    before = psutil.Process().children()  # of other tests
    with caplog.at_level(logging.WARNING):
        executor.export([mask], 64)
        executor.export([mask], 64)
    assert [why in record.getMessage() for record in caplog.records] == [True], "it is tried once"
    assert set(psutil.Process().children()) <= set(before)
    executor.prepare([mask], 64)
    assert {key[:2] for key in executor._sessions} >= {(0, 2), (2, None)}
