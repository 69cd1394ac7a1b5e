"""Answers are those of separately built models, alone, in mixed batches and beside other bundles."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import cascade
from cascade import Options
from cascade.bundle.format import Bundle, read
from cascade.engine.executors.plain import PlainExecutor
from cascade.engine.executors.selection import Kind
from cascade.model.fusion import MODES
from cascade.model.masks import Mask
from tests.helpers.answers import answers, embeddings, good, mixture, same
from tests.helpers.bundles import handmade, named
from tests.helpers.engines import EXACT, engine_of, one_mask
from tests.helpers.reference import SHAPES, Reference


@pytest.fixture(scope="module")
def built(bundle_path: Path, cifar: list[Image.Image]) -> Reference:
    """The trained bundle's."""
    return Reference(read(bundle_path), cifar[:16])


@pytest.mark.slow
@pytest.mark.parametrize("executor", EXACT)
def test_equals_separately_built_models(
    bundle_path: Path, built: Reference, cifar: list[Image.Image], executor: Kind
) -> None:
    engine = cascade.load(bundle_path, executor=executor)
    assert len(set(built.clusters)) > 1, "the images must need more than one expert, or this proves little"
    for mode in MODES:
        got = answers(engine, cifar[:16], mode=mode)
        assert [a.cluster for a in got] == built.clusters
        np.testing.assert_allclose(embeddings(got), built.embeddings(mode), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_equals_separately_built_models(cifar: list[Image.Image], shape: str) -> None:
    bundle = handmade(cifar[:40], **SHAPES[shape])
    routed: dict[int, list[Image.Image]] = {}
    for image, answer in zip(cifar, answers(engine_of(bundle), cifar[:40], mode="dispatcher"), strict=False):
        routed.setdefault(answer.cluster, []).append(image)
    images = [image for members in routed.values() for image in members[:4]]
    reference = Reference(bundle, images)
    assert len(set(reference.clusters)) > 1 or not bundle.experts
    for executor in EXACT:
        engine = engine_of(bundle, executor=executor)
        for mode in bundle.fusions:
            want, got = reference.embeddings(mode), answers(engine, images, mode=mode)
            assert [a.cluster for a in got] == reference.clusters
            assert want.std(axis=0).max() > 0.01, "the images must differ, or this proves little"
            np.testing.assert_allclose(embeddings(got), want, rtol=1e-3, atol=1e-3)


def test_masks_that_were_applied(cifar: list[Image.Image]) -> None:
    engine = engine_of(handmade(cifar[:40], experts=3))
    for answer in answers(engine, cifar[:20], mode="conditional"):
        assert answer.masks == ("dispatcher", f"expert-{answer.cluster}")
    assert {a.masks for a in answers(engine, cifar[:20], mode="dispatcher")} == {("dispatcher",)}
    every = ("dispatcher", "expert-0", "expert-1", "expert-2")
    assert {a.masks for a in answers(engine, cifar[:20], mode="unconditional")} == {every}


def test_statistics_of_a_mask_are_applied_and_taken_back(cifar: list[Image.Image]) -> None:
    bundle = handmade(cifar[:40], norms=True)
    engine = engine_of(bundle)
    executor = engine.executor(bundle)
    x = torch.stack([bundle.preprocessing.transform()(i) for i in cifar[:4]])

    def plain() -> Tensor:
        executor.swap(None)
        buffers = dict(executor.backbone.model.named_buffers())
        assert all(buffers[n].equal(t) for n, t in executor.backbone.norms.items())
        return executor.run(x).clone()

    before = plain()
    nothing_off = Mask("statistics", 0, torch.full_like(bundle.dispatcher.bits, 255), bundle.dispatcher.norms)
    executor.swap(executor.pack(nothing_off))
    assert not executor.run(x).allclose(before, rtol=1e-2), "statistics alone change the features"
    assert plain().equal(before)
    without = named(replace(bundle, dispatcher=replace(bundle.dispatcher, norms={})), "without")
    engine.add(without)
    want = embeddings(answers(engine_of(without), cifar[:4], mode="dispatcher"))
    answers(engine, cifar[:4], bundle="hand", mode="unconditional")
    got = embeddings(answers(engine, cifar[:4], bundle="without", mode="dispatcher"))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert plain().equal(before)


@pytest.mark.slow
@pytest.mark.parametrize("executor", EXACT)
@pytest.mark.parametrize("budget", [None, "one mask"])
def test_alone_as_in_a_mixed_batch(
    pair: tuple[Bundle, Bundle], cifar: list[Image.Image], budget: str | None, executor: Kind
) -> None:
    engine = engine_of(*pair, budget=one_mask(*pair, executor=executor) if budget else None, executor=executor)
    wishes = mixture("a", "b")
    together = engine.predict(cifar[:24], wishes)
    assert len({(a.bundle, a.cluster) for a in good(together)}) >= 4
    alone = {bundle.name: engine_of(bundle) for bundle in pair}
    for image, wish, answer in zip(cifar, wishes, together, strict=False):
        same(alone[str(wish.bundle)].predict([image], wish)[0], answer)


def test_a_mask_for_each_image(
    pair: tuple[Bundle, Bundle], cifar: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the executor can, many masks with few images each run at once; here on the CPU, without its kernels."""
    from cascade.engine.executors.cuda import CudaExecutor

    calls: list[int] = []
    run_each = CudaExecutor.run_each

    def spy(self: CudaExecutor, x: Tensor, masks: Sequence[Mask], start: int, stop: int | None = None) -> Tensor:
        calls.append(len(set(masks)))
        return run_each(self, x, masks, start, stop)

    monkeypatch.setattr(CudaExecutor, "run_each", spy)
    monkeypatch.setattr(
        "cascade.engine.resident.choose", lambda backbone, weight_cache, *_: CudaExecutor(backbone, weight_cache)
    )
    single = handmade(cifar[:40], name="single", experts=0, mask_from=2, norms=True)
    engine = engine_of(*pair, single)
    wishes = [*mixture("a", "b", count=6), Options(bundle="single", embedding=True)]
    together = engine.predict(cifar[: len(wishes)], wishes)
    assert calls and max(calls) > 1
    plain = engine_of(*pair, single)
    for image, wish, answer in zip(cifar, wishes, together, strict=False):
        same(plain.predict([image], wish)[0], answer)


def test_alone_as_in_a_mixed_batch_when_trained(trained: Bundle, cifar: list[Image.Image]) -> None:
    """The same with a bundle that the training made, beside itself with its experts the other way round."""
    turned = named(trained, "turned")
    turned = replace(turned, experts=turned.experts[::-1])
    engine = engine_of(trained, turned)
    wishes = mixture(trained.name, "turned", count=18)
    for image, wish, answer in zip(cifar, wishes, engine.predict(cifar[:18], wishes), strict=False):
        same(engine.predict([image], wish)[0], answer)


def test_neighbors_in_the_batch_change_nothing(pair: tuple[Bundle, Bundle], cifar: list[Image.Image]) -> None:
    engine = engine_of(*pair)
    first = answers(engine, cifar[:8], bundle="a")
    shuffled = answers(engine, [*cifar[20:30], *cifar[7::-1]], bundle="a")[10:][::-1]
    for a, b in zip(first, shuffled, strict=True):
        same(a, b)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int | None, int]]:
    """Every pass through a part of a backbone: first stage, last stage, images."""
    seen: list[tuple[int, int | None, int]] = []
    run = PlainExecutor.run

    def spy(self: PlainExecutor, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        seen.append((start, stop, len(x)))
        return run(self, x, start, stop)

    monkeypatch.setattr(PlainExecutor, "run", spy)
    return seen


def test_one_backbone_and_one_trunk_for_both(
    pair: tuple[Bundle, Bundle], cifar: list[Image.Image], runs: list[tuple[int, int | None, int]]
) -> None:
    engine = engine_of(*pair)
    assert engine.stats()["backbones"] == 1 and engine.executor(pair[0]) is engine.executor(pair[1])
    wishes = [Options(bundle=name, mode="unconditional") for name in ("a", "b")] * 4
    good(engine.predict(cifar[:8], wishes))
    plain = (0, 2, 8)  # the plain trunk, once, for the images of both
    a = [(2, 3, 4), (3, None, 4)]  # what its masks share, then the dispatcher from there
    b = [(2, None, 4)]
    experts = [(3, None, 4), (3, None, 4), (2, None, 4), (2, None, 4), (2, None, 4)]
    assert runs == [plain, *a, *b, *experts]


def test_bundles_with_other_first_stages_run_their_own_trunks(
    pair: tuple[Bundle, Bundle], cifar: list[Image.Image], runs: list[tuple[int, int | None, int]]
) -> None:
    later = handmade(cifar[:40], name="later", mask_from=4)
    engine = engine_of(pair[0], later)
    wishes = [Options(bundle=name, mode="dispatcher") for name in ("a", "later")] * 2
    good(engine.predict(cifar[:4], wishes))
    assert [r for r in runs if r[0] == 0] == [(0, 2, 2), (0, 4, 2)]


def test_experts_run_for_their_images_only(
    pair: tuple[Bundle, Bundle], cifar: list[Image.Image], runs: list[tuple[int, int | None, int]]
) -> None:
    engine = engine_of(pair[1])
    clusters = [a.cluster for a in answers(engine, cifar[:20], mode="dispatcher")]
    runs.clear()
    answers(engine, cifar[:20], mode="conditional")
    counts = [clusters.count(k) for k in sorted(set(clusters))]
    assert [r[2] for r in runs] == [20, 20, *counts], "trunk, dispatcher, each expert that is needed"
