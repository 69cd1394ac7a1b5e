"""ONNX Runtime as it runs on a GPU, with its provider for CPUs in the place of CUDA's."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from cascade.engine.executors import onnx, onnx_session, selection
from cascade.engine.executors.folded import FoldedExecutor
from cascade.engine.executors.onnx import OnnxError, OnnxExecutor
from cascade.engine.executors.onnx_session import CUDA, Provider, library
from cascade.engine.executors.plain import PlainExecutor
from cascade.engine.executors.selection import choose
from cascade.engine.weight_cache import WeightCache
from cascade.model import backbone as backbones
from tests.helpers.adapters import adapters, reference
from tests.helpers.networks import calibrated, features, images, masks_of

pytestmark = pytest.mark.slow


class Stream:
    """Records what waits for it, and what it waits for."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: "Stream") -> None:
        self.log.append(f"{self.name} after {other.name}")


@pytest.fixture(autouse=True)
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is queued behind what; graphs are exported in each test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    log: list[str] = []
    own, torchs = Stream("onnxruntime", log), Stream("torch", log)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: torchs)
    monkeypatch.setattr(onnx, "provider_of", lambda device: Provider(reorders=False, stream=own))
    return log


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit"])
def test_equals_the_plain_executor(name: str) -> None:
    """Of any batch size, from any stage, with weights that no session has seen as constants."""
    backbone = calibrated(name)
    plain, executor = PlainExecutor(backbone, WeightCache(2**30)), OnnxExecutor(backbone, WeightCache(2**30))
    assert {order.block for order in executor.layout.orders} == {1}, "row by row"
    x, last = images(backbone, 3), len(backbone.stages) - 1
    for mask in (None, *masks_of(backbone, 0, last // 2, last)):
        start = mask.start if mask else 0
        want = features(plain, mask, x, start)
        for batch in (x, x[:1]):
            got = features(executor, mask, batch, start)
            torch.testing.assert_close(got, want[: len(batch)], rtol=1e-3, atol=1e-4 * float(want.abs().max()))
    plain.swap(None)


def test_a_delta_and_channels() -> None:
    backbone = backbones.load("test_efficientnet", "random:0")
    executor = OnnxExecutor(backbone, WeightCache(2**30))
    x = torch.randn(2, *backbone.config["input_size"], generator=torch.Generator().manual_seed(1))
    for mask in adapters(backbone, 0).values():
        want, got = reference(backbone, mask, x), features(executor, mask, x, mask.start)
        assert float((got - want).norm() / want.norm()) < 1e-4


def test_it_works_between_what_torch_does(log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = calibrated("test_resnet")
    executor = OnnxExecutor(backbone, WeightCache(2**30))
    x = torch.randn(2, *backbone.config["input_size"], generator=torch.Generator().manual_seed(0))
    first = executor.run(x)
    log.clear()
    session = next(iter(executor._sessions.values()))._session
    run = session.run_with_iobinding

    def logged(binding: Any, options: Any) -> None:
        assert options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
        log.append("run")
        run(binding, options)

    monkeypatch.setattr(session, "run_with_iobinding", logged)
    assert executor.run(x).equal(first)
    assert log == ["onnxruntime after torch", "run", "torch after onnxruntime"]


def test_graphs_of_both_kinds_are_kept_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for count, reorders in enumerate((False, True), start=1):
        monkeypatch.setattr(onnx, "provider_of", lambda device, reorders=reorders: Provider(reorders=reorders))
        OnnxExecutor(calibrated("test_resnet"), WeightCache(2**30))
        assert len([*(tmp_path / "cascade" / "graphs").iterdir()]) == count


# --- a provider that is not there


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx, "provider_of", lambda device: Provider(CUDA, reorders=False))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there, it may load")
def test_a_missing_provider_names_the_extra(cuda: None) -> None:
    with pytest.raises(OnnxError, match=r"no CUDAExecutionProvider: pip install 'cascade-vision\[gpu\]'"):
        OnnxExecutor(calibrated("test_resnet"), WeightCache(2**30))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there, it may load")
@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_does_not_load_is_no_cpu(cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime only warns, and would run on the CPU."""
    monkeypatch.setattr(library("onnxruntime"), "get_available_providers", lambda: [CUDA])
    with pytest.raises(OnnxError, match="can't load its CUDAExecutionProvider"):
        OnnxExecutor(calibrated("test_resnet"), WeightCache(2**30))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there, it may load")
def test_auto_goes_on_without_it_and_says_so(
    cuda: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "ON_CPU", ("folded", "bf16", "onnx"))
    with caplog.at_level(logging.INFO):
        executor = choose(calibrated("test_resnet"), WeightCache(2**30), size=64)
    assert isinstance(executor, FoldedExecutor) and executor.kind in ("folded", "bf16")
    assert "executor onnx is left out for test_resnet: this ONNX Runtime has no CUDAExecutionProvider" in caplog.text


def test_the_options_keep_it_exact_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    class Queue:
        cuda_stream = 1234

        def __init__(self, device: torch.device) -> None:
            assert device.index == 1

    monkeypatch.setattr(torch.cuda, "Stream", Queue)
    provider = onnx_session.provider_of(torch.device("cuda:1"))
    options = provider.options
    assert (provider.name, provider.reorders) == (CUDA, False)
    assert (options["device_id"], options["user_compute_stream"], options["use_tf32"]) == ("1", "1234", "0")
    assert onnx_session.provider_of(torch.device("cpu")) == Provider()
