"""The engine on a GPU, end to end, against models on the CPU that are built for each mask."""

import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch.profiler import ProfilerActivity, profile

from cascade import Engine, Options
from cascade.engine.executors.cuda import CudaExecutor
from cascade.engine.executors.selection import Kind
from cascade.model.fusion import MODES
from tests.helpers.answers import answers, embeddings, good, mixture, same
from tests.helpers.bundles import handmade, named
from tests.helpers.deferral import two_sizes
from tests.helpers.domains import with_domain
from tests.helpers.reference import SHAPES, Reference


def engine(device: str, *bundles: object, budget: int | None = None, executor: Kind = "auto") -> Engine:
    made = Engine(budget, device, executor="folded" if executor == "auto" else executor)
    for bundle in bundles:
        made.add(bundle)  # type: ignore[arg-type]
    return made


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_equals_separately_built_models(cifar: list[Image.Image], shape: str, device: str) -> None:
    bundle = handmade(cifar[:40], **SHAPES[shape])
    ours = engine(device, bundle)
    assert type(ours.executor(bundle)) is CudaExecutor
    reference = Reference(bundle, cifar[:8])
    for mode in bundle.fusions:
        got = answers(ours, cifar[:8], mode=mode)
        assert [a.cluster for a in got] == reference.clusters
        np.testing.assert_allclose(embeddings(got), reference.embeddings(mode), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("tight", [False, True])
def test_alone_as_in_a_mixed_batch(cifar: list[Image.Image], tight: bool, device: str) -> None:
    """With no budget at all, too: the executor materializes masks in a buffer of its own."""
    pair = [
        handmade(cifar[:40], name="a", mask_from=2, expert_from=3, norms=True),
        handmade(cifar[:40], name="b", mask_from=2, experts=3, router="gmm", slots="padded", seed=1),
    ]
    ours = engine(device, *pair, budget=0 if tight else None)
    wishes = mixture("a", "b")
    together = ours.predict(cifar[:24], wishes)
    assert len({(a.bundle, a.cluster) for a in good(together)}) >= 4
    for image, wish, answer in zip(cifar, wishes, together, strict=False):
        same(ours.predict([image], wish)[0], answer)
    stats = ours.stats()
    assert stats["materialized_bytes"] <= stats["budget_bytes"]


def test_bfloat16(cifar: list[Image.Image], device: str) -> None:
    bundle = handmade(cifar[:40], norms=True)
    got = answers(engine(device, bundle, executor="bf16"), cifar[:16], mode="dispatcher")
    want = Reference(bundle, cifar[:16]).embeddings("dispatcher")
    found = embeddings(got)
    cosine = (found * want).sum(axis=1) / np.linalg.norm(found, axis=1) / np.linalg.norm(want, axis=1)
    assert cosine.min() > 0.99


def test_every_mode_is_answered(cifar: list[Image.Image], device: str) -> None:
    ours = engine(device, handmade(cifar[:40]))
    for mode in MODES:
        good(ours.predict(cifar[:3], Options(mode=mode, embedding=True)))


@pytest.mark.parametrize("mode, expected", [("dispatcher", 1), ("conditional", 2), ("unconditional", 1)])
def test_how_often_the_host_waits(cifar: list[Image.Image], device: str, mode: str, expected: int) -> None:
    """As PyTorch itself counts it."""
    ours = engine(device, handmade(cifar[:40], mask_from=2, expert_from=3, experts=3))
    batch = [ours.prepare(image, Options(mode=mode, embedding=True)) for image in cifar[:16]]
    found = waits(lambda: ours.run(batch))  # type: ignore[arg-type]
    assert len(found) == expected, found


def waits(run: Callable[[], object]) -> list[str]:
    """What makes the host wait, in the second of two runs."""
    run()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [text for warning in seen if "synchroniz" in (text := str(warning.message))]


def test_two_input_sizes_and_dispatch(cifar: list[Image.Image], device: str) -> None:
    """As on a CPU; nothing is captured in a pass, and dispatch makes the host wait once more."""
    pair = with_domain(two_sizes(cifar[:20], threshold=1.0, name="a", mask_from=2), cifar[:200])
    other = with_domain(handmade(cifar[:20], name="b", experts=0, size=32, seed=1), cifar[200:])
    plain, ours = Engine(executor="plain"), engine(device, pair, other)
    for bundle in (pair, other):
        plain.add(bundle)
    executor = ours.executor(pair)
    assert isinstance(executor, CudaExecutor)
    graphs = set(executor._graphs)
    for wish in (Options("a"), Options("a", mode="fast"), Options("a", mode="full"), Options("auto")):
        for got, want in zip(ours.predict(cifar[40:60], wish), plain.predict(cifar[40:60], wish), strict=True):
            assert got.ok == want.ok
            if got.ok and want.ok:
                assert (got.bundle, got.deferral) == (want.bundle, want.deferral)
                np.testing.assert_allclose(got.labels[0].score, want.labels[0].score, atol=1e-3)
    assert set(executor._graphs) == graphs
    batch = [ours.prepare(image, Options("auto")) for image in cifar[40:56]]
    assert len(waits(lambda: ours.run_pass(batch))) == 2  # type: ignore[arg-type]


def test_graphs_leave_with_the_last_bundle(cifar: list[Image.Image], device: str) -> None:
    """And what captures the next ones finds a memory pool that PyTorch still takes."""
    bundle = handmade(cifar[:40], experts=0)
    ours = engine(device, bundle, named(bundle, "other"), handmade(cifar[:40], name="small", experts=0, size=32))
    executor = ours.executor(bundle)
    assert isinstance(executor, CudaExecutor)
    for name in ("hand", "other"):
        assert any(key[-1] == (3, 64, 64) for key in executor._needed())
        ours.remove(name, "1")
    assert not any(key[-1] == (3, 64, 64) for key in executor._needed())
    ours.remove("small", "1")
    ours.add(bundle)
    good(ours.predict(cifar[:5]))


def test_adding_a_bundle_captures_all_that_it_needs(cifar: list[Image.Image], device: str) -> None:
    bundle = handmade(cifar[:40], mask_from=2, expert_from=3, experts=3)
    ours = engine(device, bundle)
    executor = ours.executor(bundle)
    assert isinstance(executor, CudaExecutor)
    graphs = set(executor._graphs)
    for count in (1, 2, 3, 8, 32):
        for mode in MODES:
            good(ours.predict(cifar[:count], Options(mode=mode)))
    assert set(executor._graphs) == graphs
    assert ours.stats()["backbone_bytes"] > sum(graph.bytes for graph in executor._graphs.values()) > 0


def test_the_last_gpu(cifar: list[Image.Image], device: str) -> None:
    """Nothing may depend on the current device being the executor's."""
    last = f"cuda:{torch.cuda.device_count() - 1}"
    bundle = handmade(cifar[:40])
    want = answers(engine(device, bundle), cifar[:5])
    np.testing.assert_allclose(embeddings(answers(engine(last, bundle), cifar[:5])), embeddings(want), atol=1e-3)


def test_many_bundles_share_their_launches(cifar: list[Image.Image], device: str) -> None:
    """All of a pass: its graphs, and what follows for 20 bundles."""
    single = handmade(cifar[:40], mask_from=2, experts=0)
    ours = engine(device, *(named(single, f"single-{i}") for i in range(20)))
    batch = [ours.prepare(image, Options(f"single-{i % 20}")) for i, image in enumerate(cifar[:32])]
    ours.run(batch)  # type: ignore[arg-type]
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        ours.run(batch)  # type: ignore[arg-type]
    launches = [event.name for event in seen.events() or [] if "Launch" in event.name]
    assert sum(name == "cudaGraphLaunch" for name in launches) == 2, "the trunk, and a mask for each image"
    assert len(launches) < 300, launches
