"""ONNX Runtime with bound weights: the order that it keeps them in is found, and what can't be bound is said."""

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from cascade.engine.executors.onnx import OnnxError, OnnxExecutor, _order, library
from cascade.engine.weight_cache import WeightCache
from cascade.kernels.weight_layout import BlockOrder
from cascade.model import backbone as backbones
from cascade.model.folding import Unit
from cascade.model.masks import Mask, all_ones
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def no_graphs_yet(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every graph is exported, whatever the machine's cache holds."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize("block", [1, 8, 16])
def test_the_order_is_read_off_the_probe(block: int) -> None:
    unit = Unit("layer", None, 0, 0, (20, 3, 3, 3))
    columns = np.append(np.random.default_rng(0).permutation(27), [-1, -1]).astype(np.int32)
    probe = torch.arange(1, 20 * 27 + 1).view(20, 27).float()
    kept = BlockOrder(block, columns).arrange(probe).numpy()
    found = _order(unit, 5, np.where(kept > 0, kept + 5, 0), np.zeros(-(-20 // block) * block))
    assert found.block == block
    np.testing.assert_array_equal(found.columns, columns)


def test_an_order_that_is_none() -> None:
    unit = Unit("layer", None, 0, 0, (16, 8, 1, 1))
    values = np.random.default_rng(0).permutation(128).astype(np.float32) + 1
    with pytest.raises(OnnxError, match="layer: ONNX Runtime keeps its weights in an order that is not known"):
        _order(unit, 0, values, np.zeros(16))


def test_blocks_are_found_on_this_processor() -> None:
    """Without blocks everything would still be right, and half as fast."""
    executor = OnnxExecutor(backbones.load("test_resnet", "random:0"), WeightCache(2**30))
    blocks = {order.block for order in executor.layout.orders}
    assert blocks in ({16}, {8}), blocks


def test_it_is_freed_without_a_garbage_collection() -> None:
    executor = OnnxExecutor(backbones.load("test_resnet", "random:0"), WeightCache(2**30))
    executor.run(torch.zeros(1, *executor.backbone.config["input_size"]))
    reference = weakref.ref(executor)
    gc.disable()
    try:
        del executor
        assert reference() is None, "servers exempt what they have loaded from collections"
    finally:
        gc.enable()


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(OnnxError, match=r"onnx is not installed: pip install 'cascade-vision\[cpu\]'"):
        OnnxExecutor(backbones.load("test_resnet", "random:0"), WeightCache(2**30))


def test_nothing_is_reported_to_anybody(tmp_path: Path) -> None:
    """ONNX Runtime's own telemetry would leave an identifier in the temporary folder, and send it."""
    program = "from cascade.engine.executors.onnx import library; library('onnxruntime').SessionOptions()"
    kept = {k: v for k, v in os.environ.items() if not k.startswith("ORT_")}
    subprocess.run([sys.executable, "-c", program], env=kept | {"TMPDIR": str(tmp_path)}, cwd=ROOT, check=True)
    assert not list(tmp_path.iterdir())


def test_what_goes_wrong_inside_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the measurement goes on with the other executors."""

    def cut(*_: object, **__: object) -> None:
        raise ValueError("the model is cut")

    monkeypatch.setattr(library("onnxruntime"), "InferenceSession", cut)
    with pytest.raises(OnnxError, match="test_resnet: ONNX Runtime can't optimize it: the model is cut"):
        OnnxExecutor(backbones.load("test_resnet", "random:0"), WeightCache(2**30))


def test_a_second_bundle_of_the_same_stages_builds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copying the model to see what a graph needs would cost every load more than the rest of it."""
    network = backbones.load("test_resnet", "random:0")
    executor = OnnxExecutor(network, WeightCache(2**30))
    masks = [executor.pack(Mask("dispatcher", 0, all_ones(network.weights.numel())))]
    executor.prepare(masks, 64)
    with monkeypatch.context() as patch:
        patch.setattr("cascade.engine.executors.onnx._probe", None)
        executor.prepare(masks, 64)
    executor.prepare(masks, 96)
    assert {key[2][-1] for key in executor._sessions} >= {64, 96}


def test_no_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is no hindrance."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    OnnxExecutor(backbones.load("test_resnet", "random:0"), WeightCache(2**30))
