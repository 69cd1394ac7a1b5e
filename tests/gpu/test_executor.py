"""The CUDA executor with its kernels and graphs, against the plain executor on the CPU."""

from collections.abc import Iterator
from copy import deepcopy

import pytest
import torch
from torch import Tensor

from cascade.engine.executors.cuda import CudaExecutor
from cascade.engine.executors.onnx import OnnxExecutor
from cascade.engine.executors.onnx_session import CUDA
from cascade.engine.executors.plain import PlainExecutor
from cascade.engine.executors.selection import ON_GPU, TOLERANCE, choose
from cascade.engine.weight_cache import WeightCache
from cascade.kernels.weight_layout import PackedMask
from cascade.model import backbone as backbones
from cascade.model.backbone import Backbone
from tests.helpers import adapters
from tests.helpers.networks import NETWORKS, calibrated, features, images, masks_of


@pytest.fixture(scope="module", params=NETWORKS)
def backbone(request: pytest.FixtureRequest) -> Iterator[Backbone]:
    """On the CPU: the reference runs there."""
    yield calibrated(request.param)


def moved(backbone: Backbone, device: str) -> Backbone:
    return backbones.wrap(deepcopy(backbone.model), backbone.name, backbone.source, device)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.cpu(), want, rtol=2e-3, atol=2e-4 * float(want.abs().max()))


def test_equals_the_plain_executor(backbone: Backbone, device: str) -> None:
    """Graphs that were captured under one mask and are replayed under others, and for the plain backbone."""
    plain, executor = (
        PlainExecutor(backbone, WeightCache(2**30)),
        CudaExecutor(moved(backbone, device), WeightCache(2**30)),
    )
    last = len(backbone.stages) - 1
    masks = [*masks_of(backbone, last, min(last, 1), 0, last), *masks_of(backbone, 0, norms=False)]
    packed = {mask: executor.pack(mask) for mask in masks}
    x = images(backbone, 3)
    bare = features(plain, None, x, 0)
    want = {mask: features(plain, mask, x, mask.start) for mask in masks}
    plain.swap(None)
    for mask in [*masks, *masks[::-1]]:
        executor.swap(None)
        close(executor.run(x.to(device)), bare)
        trunk = executor.run(x.to(device), 0, mask.start) if mask.start else x.to(device)
        executor.swap(packed[mask])
        close(executor.run(trunk, mask.start), want[mask])


@pytest.mark.parametrize("start", [0, 2, -1])
def test_a_mask_for_each_image(backbone: Backbone, start: int, device: str) -> None:
    plain, executor = (
        PlainExecutor(backbone, WeightCache(2**30)),
        CudaExecutor(moved(backbone, device), WeightCache(2**30)),
    )
    stage = backbone.stage(min(start, len(backbone.stages) - 1))
    masks = masks_of(backbone, stage, 0, stage // 2, stage, stage)
    order = [masks[i] for i in (0, 1, 2, 3, 1)]
    x = plain.run(images(backbone, 5), 0, stage) if stage else images(backbone, 5)
    want = []
    for row, mask in enumerate(order):
        plain.swap(mask)
        want.append(plain.run(x[row : row + 1], stage).clone())
    plain.swap(None)
    packed = {mask: executor.pack(mask) for mask in masks}
    for _ in range(2):
        close(executor.run_each(x.to(device), [packed[mask] for mask in order], stage), torch.cat(want))
    turned = executor.run_each(x.flip(0).to(device), [packed[mask] for mask in order[::-1]], stage).flip(0)
    close(turned, torch.cat(want))


@pytest.mark.parametrize("name", adapters.NETWORKS)
def test_adapters_of_every_kind(name: str, device: str) -> None:
    """Channels and 1-bit deltas, one after another, and all of them in one batch."""
    backbone = backbones.load(name, "random:0")
    executor = CudaExecutor(moved(backbone, device), WeightCache(0))
    start = len(backbone.stages) // 2
    kinds = {kind: mask for kind, mask in adapters.adapters(backbone, start).items() if mask.start == start}
    x = torch.randn(len(kinds), *backbone.config["input_size"], generator=torch.Generator().manual_seed(1))
    trunk = executor.run(x.to(device), 0, start)
    packed = [executor.pack(mask) for mask in kinds.values()]
    together = executor.run_each(trunk, packed, start).cpu()
    for row, (kind, mask) in enumerate(zip(kinds, packed, strict=True)):
        want = adapters.reference(backbone, kinds[kind], x[row : row + 1])[0]
        executor.swap(mask)
        for got in (executor.run(trunk[row : row + 1], start).cpu()[0], together[row]):
            assert float((got - want).norm() / want.norm()) < 1e-3, kind


def test_bfloat16(device: str) -> None:
    backbone = calibrated("test_resnet")
    plain = PlainExecutor(backbone, WeightCache(2**30))
    executor = CudaExecutor(moved(backbone, device), WeightCache(2**30), torch.bfloat16)
    masks, x = masks_of(backbone, 0, 0, 0), images(backbone, 3)
    want = torch.cat([features(plain, mask, x[i : i + 1], 0) for i, mask in enumerate(masks)])
    packed = [executor.pack(mask) for mask in masks]
    got = executor.run_each(x.to(device), packed, 0).cpu()
    assert torch.nn.functional.cosine_similarity(got, want).min() > 0.999
    for i, mask in enumerate(packed):
        executor.swap(mask)
        got = executor.run(x.to(device)).cpu()
        assert torch.nn.functional.cosine_similarity(got[i], want[i], dim=0) > 0.999


def test_swaps_cost_no_memory_and_no_capture(device: str) -> None:
    backbone = calibrated("test_resnet")
    executor = CudaExecutor(moved(backbone, device), WeightCache(2**30))
    masks: list[PackedMask] = [executor.pack(mask) for mask in masks_of(backbone, 0, 0, 0, 0)]
    x = images(backbone, 4).to(device)

    def round_of_all() -> None:
        for mask in masks:
            executor.swap(mask)
            executor.run(x)
        executor.run_each(x, masks, 0)
        executor.swap(None)
        executor.run(x)

    round_of_all()
    torch.cuda.synchronize()
    held, graphs = torch.cuda.memory_allocated(), list(executor._graphs)
    for _ in range(10):
        round_of_all()
    assert torch.cuda.memory_allocated() <= held and list(executor._graphs) == graphs


def test_the_choice(device: str) -> None:
    for kind, dtype, tf32 in (
        ("folded", torch.float32, False),
        ("tf32", torch.float32, True),
        ("bf16", torch.bfloat16, False),
    ):
        backbone = backbones.load("test_resnet", "random:0", device=device)
        executor = choose(backbone, WeightCache(2**30), kind)  # type: ignore[arg-type]
        assert type(executor) is CudaExecutor and (executor.dtype, executor.tf32) == (dtype, tf32)
    fastest = choose(backbones.load("test_resnet", "random:0", device=device), WeightCache(0))
    assert fastest.kind in ON_GPU and fastest.error <= max(TOLERANCE.values())


def test_onnx_runtime(device: str) -> None:
    """Its CUDA provider, with every tensor bound on the device."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    if CUDA not in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has no CUDA provider")
    backbone = calibrated("test_resnet")
    plain = PlainExecutor(backbone, WeightCache(2**30))
    executor = OnnxExecutor(moved(backbone, device), WeightCache(2**30))
    x = images(backbone, 3)
    for mask in (None, *masks_of(backbone, 0, 2)):
        start = mask.start if mask else 0
        want = features(plain, mask, x, start)
        for _ in range(2):
            close(features(executor, mask, x.to(device), start), want)
    plain.swap(None)
