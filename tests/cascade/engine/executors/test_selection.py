"""The choice of an executor: measured once, recorded, and never a reason to fail."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cascade import Engine
from cascade.engine.executors import selection
from cascade.engine.executors.folded import FoldedExecutor
from cascade.engine.executors.onnx import OnnxError, OnnxExecutor
from cascade.engine.executors.plain import PlainExecutor
from cascade.engine.executors.selection import choose
from cascade.engine.weight_cache import WeightCache
from cascade.errors import CascadeError
from cascade.model import backbone as backbones
from tests.helpers.bundles import handmade
from tests.helpers.metrics import now

pytestmark = pytest.mark.slow

KINDS = {"plain": PlainExecutor, "folded": FoldedExecutor, "onnx": OnnxExecutor}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "cascade" / "executors.json"


def quick(patch: pytest.MonkeyPatch) -> None:
    """Measure the executors that start at once."""
    patch.setattr(selection, "ON_CPU", ("plain", "folded"))
    patch.setitem(selection.TOLERANCE, "plain", 1e-6)


@pytest.fixture
def key(cache: Path) -> str:
    """What a measurement is recorded under."""
    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        chosen(size=64)
    (key,) = json.loads(cache.read_text())
    return str(key)


def chosen(kind: Any = "auto", size: int | None = None) -> Any:
    return choose(backbones.load("test_resnet", "random:0"), WeightCache(2**30), kind, size)


@pytest.mark.parametrize("kind", KINDS)
def test_one_that_is_asked_for(kind: str, cache: Path) -> None:
    assert type(chosen(kind)) is KINDS[kind]
    assert not cache.exists(), "nothing was measured"


def test_the_fastest_is_taken_and_recorded(cache: Path) -> None:
    executor = chosen(size=64)
    ((key, seconds),) = json.loads(cache.read_text()).items()
    assert key.endswith("test_resnet, 64 px") and set(seconds) == {"folded", "onnx"}
    assert type(executor) is KINDS[min(seconds, key=seconds.get)] and min(seconds.values()) > 0
    assert sorted(p.name for p in cache.parent.iterdir()) == ["executors.json", "graphs"], "no temporary file stays"


@pytest.mark.parametrize("kind", ["folded", "bf16"])
def test_a_model_that_folding_gets_wrong(kind: Any, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    """CoAtNet's stride lies past its layers: refused by name, and ``auto`` runs the model as it is."""
    backbone = backbones.load("test_coatnet", "random:0")
    with pytest.raises(CascadeError, match="other features than the model under a mask of test_coatnet"):
        choose(backbone, WeightCache(2**30), kind)
    assert not backbone.weights.is_meta, "the plain model is still there"


def test_auto_runs_such_a_model_as_it_is(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    backbone = backbones.load("test_coatnet", "random:0")
    assert type(choose(backbone, WeightCache(2**30))) is PlainExecutor
    assert not backbone.weights.is_meta and not cache.exists()
    assert "test_coatnet runs with the plain executor" in caplog.text


def test_layers_that_no_mask_can_be_folded_into() -> None:
    with pytest.raises(CascadeError, match="92% of the masked weights of test_nfnet are in layers"):
        choose(backbones.load("test_nfnet", "random:0"), WeightCache(2**30), "folded")


def test_checking_is_not_counted() -> None:
    weight_cache, before = WeightCache(1), now("mask_misses_total")  # no mask fits
    executor = choose(backbones.load("test_byobnet", "random:0"), weight_cache, "folded", 64)
    assert executor.weight_cache is weight_cache and (
        weight_cache.used,
        weight_cache.misses,
        weight_cache.evictions,
    ) == (0, 0, 0)
    assert now("mask_misses_total") == before
    assert executor.backbone.weights.is_meta, "the plain model is given up"


@pytest.mark.parametrize("fast", ["folded", "onnx"])
def test_the_record_decides(fast: str, cache: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write_text(json.dumps({key: {"folded": 1.0, "onnx": 1.0} | {fast: 1e-9}}))
    monkeypatch.setattr(selection, "_write", lambda record: pytest.fail("it measured again"))
    assert type(chosen(size=64)) is KINDS[fast]


def test_without_onnx_runtime(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    def missing(name: str) -> Any:
        raise OnnxError(f"{name} is missing")

    monkeypatch.setattr("cascade.engine.executors.onnx.library", missing)
    assert type(chosen()) is FoldedExecutor
    with pytest.raises(CascadeError, match="is missing"):
        chosen("onnx")


def test_what_was_recorded_is_gone(
    monkeypatch: pytest.MonkeyPatch, cache: Path, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache.write_text(json.dumps({key: {"onnx": 1e-9, "folded": 1.0}}))

    def missing(name: str) -> Any:
        raise OnnxError(f"{name} is missing")

    monkeypatch.setattr("cascade.engine.executors.onnx.library", missing)
    with caplog.at_level(logging.WARNING):
        assert type(chosen(size=64)) is FoldedExecutor
    assert "executor onnx can't be used any more: onnx is missing" in caplog.text


@pytest.mark.parametrize("damage", ["", "[]", '{"other": 1}', "\0"])
def test_a_damaged_record_is_measured_again(damage: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    cache.parent.mkdir()
    cache.write_text(damage)
    chosen(size=64)
    assert any(key.endswith("test_resnet, 64 px") for key in json.loads(cache.read_text()))


def test_a_cache_that_cannot_be_written(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    cache.parent.write_text("a file where the folder should be")
    assert type(chosen(size=64)) in (PlainExecutor, FoldedExecutor)


def test_an_unknown_one() -> None:
    with pytest.raises(CascadeError, match="no executor 'fast'; choose one of: auto plain folded tf32 bf16 onnx"):
        chosen("fast")


def test_the_record_is_bounded(cache: Path) -> None:
    selection._write({f"{i} px": {"folded": 0.1} for i in range(selection.RECORDED + 5)})
    assert [*json.loads(cache.read_text())] == [f"{i} px" for i in range(5, selection.RECORDED + 5)]


@pytest.mark.parametrize(("kind", "least", "most"), [("folded", 1e-9, 1e-5), ("bf16", 1e-4, selection.ROUNDED)])
def test_how_exact_the_choice_is_can_be_read(kind: Any, least: float, most: float, cifar: list[Image.Image]) -> None:
    if kind == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no bfloat16")
    engine, bundle = Engine(executor=kind), handmade(cifar[:20], experts=0)
    engine.add(bundle)
    executor = engine.executor(bundle)
    assert executor.kind == kind and least < executor.error < most
    assert now("feature_error") == pytest.approx(executor.error)
    engine.remove("hand", "1")
    assert now("feature_error") == 0
