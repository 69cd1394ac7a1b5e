"""Graphs are exported once: a second executor reads them, whatever is wrong with the cache costs a new export only."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cascade.engine.executors import graph_cache, onnx
from cascade.engine.executors.onnx import OnnxExecutor
from cascade.engine.weight_cache import WeightCache
from tests.helpers.networks import calibrated, features, images, masks_of

pytest.importorskip("onnxruntime")


@pytest.fixture
def exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each export, with a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made: list[int] = []
    export = onnx.export

    def count(*arguments: object) -> bytes:
        made.append(1)
        return export(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(onnx, "export", count)
    return made


def test_a_second_executor_reads_the_graphs_and_computes_the_same(exports: list[int], tmp_path: Path) -> None:
    x = images(calibrated("test_resnet"), 3)
    answers = []
    for _ in range(2):
        backbone = calibrated("test_resnet")
        (mask,) = masks_of(backbone, 2)
        executor = OnnxExecutor(backbone, WeightCache(2**30))
        executor.prepare([mask], x.shape[-1])
        answers.append(features(executor, mask, x, 2))
        assert len(exports) == 3, "the whole, the trunk, the tail; none the second time"
    np.testing.assert_array_equal(answers[0], answers[1])
    assert len(list((tmp_path / "cascade" / "graphs").iterdir())) == 3


def test_a_damaged_or_closed_cache_costs_an_export(
    exports: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make() -> OnnxExecutor:
        return OnnxExecutor(calibrated("test_resnet"), WeightCache(2**30))

    make()
    (path,) = (tmp_path / "cascade" / "graphs").iterdir()
    whole = path.read_bytes()
    for damaged in (b"", whole[:100], whole[:-10], b"\xff" * 100):
        path.write_bytes(damaged)
        make()
        assert path.read_bytes() == whole
    assert len(exports) == 5
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    make()
    make()
    assert len(exports) == 7


def test_what_a_graph_depends_on_is_in_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {graph_cache.path_of("a", 0, None, [3, 32, 32]), graph_cache.path_of("b", 0, None, [3, 32, 32])}
    paths |= {graph_cache.path_of("a", 1, None, [3, 32, 32]), graph_cache.path_of("a", 0, None, [3, 64, 64])}
    monkeypatch.setattr(graph_cache, "_machine", graph_cache._machine.__wrapped__)  # not cached
    monkeypatch.setattr(graph_cache, "version", lambda package: "another")
    paths.add(graph_cache.path_of("a", 0, None, [3, 32, 32]))
    monkeypatch.setattr(Path, "read_text", lambda path: "flags : avx512f")
    paths.add(graph_cache.path_of("a", 0, None, [3, 32, 32]))
    assert len(paths) == 6


def test_it_is_the_same_graph(exports: list[int], tmp_path: Path) -> None:
    made = onnx.made(onnx.Folded(calibrated("test_resnet")), torch.zeros(1, 3, 32, 32), 0, None)
    path = tmp_path / "graph.safetensors"
    graph_cache.write(path, made)
    parts = graph_cache.read(path)
    assert parts is not None
    model, orders, first, shapes = parts
    assert (model, first, shapes) == (made[0], made[2], made[3])
    for read, order in zip(orders, made[1], strict=True):
        assert read.block == order.block and np.array_equal(read.columns, order.columns)
