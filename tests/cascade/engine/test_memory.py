"""Budgets of masks, what is counted, and what is freed."""

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from cascade import Options
from cascade.bundle.format import Bundle, read
from cascade.engine.executors import plain as plain_executor
from cascade.engine.executors.selection import Kind
from cascade.errors import CascadeError
from cascade.kernels.materialize import materialize
from cascade.kernels.weight_layout import PackedMask, WeightLayout
from cascade.model import backbone as backbones
from cascade.model.masks import Mask
from tests.helpers.answers import answers, embeddings, good, mixture, same
from tests.helpers.bundles import handmade
from tests.helpers.engines import EXACT, engine_of, one_mask

pytestmark = pytest.mark.slow


class Materialized:
    """Bytes of masked weights that are alive, by their storages: a parameter that still looks at some counts, too."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0
        plain, laid_out = materialize, WeightLayout.materialize

        def seen(size: int, out: Tensor | None, make: Callable[[], Tensor]) -> Tensor:
            self.most = max(self.most, self.alive() + (size if out is None else 0))
            weights = make()
            reference = StorageWeakRef(weights.untyped_storage())
            self.made.setdefault(reference.cdata, (reference, weights.nbytes))
            return weights

        def materialize_model(backbone: backbones.Backbone, mask: Mask, out: Tensor | None = None) -> Tensor:
            size = 4 * (backbone.weights.numel() - backbone.offset(mask.start))
            return seen(size, out, lambda: plain(backbone, mask, out))

        def materialize_layout(self: WeightLayout, mask: PackedMask, out: Tensor | None = None) -> Tensor:
            return seen(self.size(mask.start), out, lambda: laid_out(self, mask, out))

        monkeypatch.setattr(plain_executor, "materialize", materialize_model)
        monkeypatch.setattr(WeightLayout, "materialize", materialize_layout)

    def alive(self) -> int:
        return sum(size for reference, size in self.made.values() if not reference.expired())


@pytest.fixture
def materialized(monkeypatch: pytest.MonkeyPatch) -> Materialized:
    return Materialized(monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("executor", EXACT)
@pytest.mark.parametrize("room", [1, 1.7, 3])
def test_the_budget_is_kept_and_evicted_weights_are_freed(
    pair: tuple[Bundle, Bundle], cifar: list[Image.Image], materialized: Materialized, room: float, executor: Kind
) -> None:
    """Masks of three sizes, over a budget that some of them fill alone."""
    whole = handmade(cifar[:40], name="whole", norms=True)
    budget = int(one_mask(*pair, whole, executor=executor) * room)
    wishes = mixture("a", "b", "whole", count=18)
    want = engine_of(*pair, whole).predict(cifar[:18], wishes)
    engine = engine_of(*pair, whole, budget=budget, executor=executor)
    materialized.made.clear()
    materialized.most = 0  # an executor is checked when it is made, before the budget counts
    for order in (range(18), range(17, -1, -1)):
        got = engine.predict([cifar[i] for i in order], [wishes[i] for i in order])
        for i, answer in zip(order, got, strict=True):
            same(answer, want[i])
        stats = engine.stats()
        assert stats["materialized_bytes"] <= stats["budget_bytes"] == budget
        assert materialized.alive() == stats["materialized_bytes"]
    assert 0 < materialized.most <= budget
    assert engine.stats()["evictions"] > 0


def test_a_budget_below_one_mask(pair: tuple[Bundle, Bundle]) -> None:
    needed = one_mask(pair[0])
    with pytest.raises(
        CascadeError, match=f"needs {needed} bytes for the weights of one mask, but --budget is {needed - 1}"
    ):
        engine_of(pair[0], budget=needed - 1)


@pytest.mark.parametrize("executor", EXACT)
def test_two_backbones_share_a_budget_of_one_mask(
    cifar: list[Image.Image], materialized: Materialized, executor: Kind
) -> None:
    """Two networks of one shape: what one of them evicts, and has written over, the other one must not look at."""
    a = handmade(cifar[:40], name="a", source="random:0", experts=0)
    b = handmade(cifar[:40], name="b", source="random:1", experts=0)
    size = one_mask(a, b, executor=executor)
    want = {bundle.name: embeddings(answers(engine_of(bundle), cifar[:4])) for bundle in (a, b)}
    engine = engine_of(a, b, budget=size, executor=executor)
    materialized.made.clear()
    assert engine.stats()["backbones"] == 2
    for name in "abbaab":
        found = embeddings(answers(engine, cifar[:4], bundle=name))
        np.testing.assert_allclose(found, want[name], rtol=1e-4, atol=1e-4)
        assert materialized.alive() == size
    mixed = engine.predict(cifar[:4], [Options(bundle=n, embedding=True) for n in "abab"])
    want_mixed = np.stack([want["ab"[i % 2]][i] for i in range(4)])
    np.testing.assert_allclose(embeddings(good(mixed)), want_mixed, rtol=1e-4, atol=1e-4)


def test_swaps_are_counted(pair: tuple[Bundle, Bundle], cifar: list[Image.Image]) -> None:
    a = pair[0]
    engine = engine_of(a)
    answers(engine, cifar[:8], mode="unconditional")
    assert [engine.stats()[n] for n in ("misses", "hits", "evictions")] == [3, 0, 0]
    answers(engine, cifar[:8], mode="unconditional")
    assert [engine.stats()[n] for n in ("misses", "hits", "evictions")] == [3, 3, 0]
    tight = engine_of(a, budget=one_mask(a))
    answers(tight, cifar[:8], mode="unconditional")
    assert [tight.stats()[n] for n in ("misses", "hits", "evictions")] == [3, 0, 2]


def tensor_bytes() -> int:
    """All memory that is held by any tensor in this process."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, torch.nn.Parameter):
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("executor", EXACT)
def test_a_further_bundle_costs_less_than_half_a_backbone(
    bundle_path: Path, cifar: list[Image.Image], executor: Kind
) -> None:
    """Of the real thing: Lite0 and bundles that the training made, at a budget of one materialized mask."""
    first = read(bundle_path)
    engine = engine_of(first, budget=one_mask(first, executor=executor), executor=executor)
    answers(engine, cifar[:6], bundle="small", mode="unconditional")
    copy = sum(4 * p.numel() for p in engine.executor(first).backbone.model.parameters())
    stats, held = engine.stats(), tensor_bytes()
    assert 0.99 * copy <= stats["backbone_bytes"] < 1.1 * copy, "one copy, whatever the executor makes of it"
    for k in range(1, 4):
        engine.add(replace(read(bundle_path), name=f"further-{k}"))
        answers(engine, cifar[:6], bundle=f"further-{k}", mode="unconditional")
        now = engine.stats()
        assert now["backbone_bytes"] == stats["backbone_bytes"], "one backbone, however many bundles"
        resident = [sum(s[n] for n in ("backbone_bytes", "packed_bytes", "materialized_bytes")) for s in (stats, now)]
        assert 0 < resident[1] - resident[0] < k * copy / 2
        assert tensor_bytes() - held < k * copy / 2, "counted and measured"


def test_packed_bytes_are_those_of_the_bundles(pair: tuple[Bundle, Bundle]) -> None:
    engine = engine_of(*pair)
    assert engine.stats()["packed_bytes"] == sum(b.bytes() for b in pair)
    assert engine.stats()["bundles"] == 2 and engine.bundles == [("a", "1"), ("b", "1")]
