"""The engine on a GPU, end to end, against models on the CPU that are built for each mask."""

import numpy as np
import pytest
from PIL import Image

from cascade import Engine, Options
from cascade.engine.executors.cuda import CudaExecutor
from cascade.engine.executors.selection import Kind
from cascade.model.fusion import MODES
from tests.cascade.engine.test_engine import SHAPES, answers, embeddings, good, mixture, reference, same
from tests.helpers.bundles import handmade


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
    for mode in bundle.fusions:
        clusters, want = reference(bundle, cifar[:8], mode)
        got = answers(ours, cifar[:8], mode=mode)
        assert [a.cluster for a in got] == clusters
        np.testing.assert_allclose(embeddings(got), want, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("tight", [False, True])
def test_alone_as_in_a_mixed_batch(cifar: list[Image.Image], tight: bool, device: str) -> None:
    """With a budget of one mask, too."""
    pair = [
        handmade(cifar[:40], name="a", mask_from=2, expert_from=3, norms=True),
        handmade(cifar[:40], name="b", mask_from=2, experts=3, router="gmm", slots="padded", seed=1),
    ]
    ours = engine(device, *pair)
    if tight:
        most = max(ours.executor(b).size(mask) for b in pair for mask in ours.find(b.name).masks)  # type: ignore[union-attr]
        ours = engine(device, *pair, budget=most)
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
    want = reference(bundle, cifar[:16], "dispatcher")[1]
    found = embeddings(got)
    cosine = (found * want).sum(axis=1) / np.linalg.norm(found, axis=1) / np.linalg.norm(want, axis=1)
    assert cosine.min() > 0.99


def test_every_mode_is_answered(cifar: list[Image.Image], device: str) -> None:
    ours = engine(device, handmade(cifar[:40]))
    for mode in MODES:
        good(ours.predict(cifar[:3], Options(mode=mode, embedding=True)))
