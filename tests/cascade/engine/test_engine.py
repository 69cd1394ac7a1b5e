"""The engine: against a plain reference that builds each masked model separately, and whatever shares it."""

import gc
import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

import cascade
from cascade import Engine, ItemError, Options, Prediction
from cascade.bundle.format import Bundle, BundleError, read
from cascade.engine.executors import plain as plain_executor
from cascade.engine.executors.plain import PlainExecutor
from cascade.engine.executors.selection import Kind
from cascade.errors import CascadeError
from cascade.kernels.materialize import materialize
from cascade.kernels.weight_layout import PackedMask, WeightLayout
from cascade.model import backbone as backbones
from cascade.model.fusion import MODES
from cascade.model.masks import Mask
from tests.helpers.answers import answers, embeddings, good, mixture, same
from tests.helpers.bundles import handmade, named
from tests.helpers.reference import SHAPES, Reference

EXACT: tuple[Kind, ...] = ("plain", "folded", "onnx")
"""The executors that compute in float32."""


def engine_of(*bundles: Bundle, budget: int | None = None, executor: Kind = "plain") -> Engine:
    engine = Engine(budget, executor=executor)
    for bundle in bundles:
        engine.add(bundle)
    return engine


# --- the same as separately built models


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


# --- several bundles, one backbone


@pytest.fixture(scope="module")
def pair(cifar: list[Image.Image]) -> tuple[Bundle, Bundle]:
    """Two unlike bundles over one backbone, with one first stage."""
    a = handmade(cifar[:40], name="a", mask_from=2, expert_from=3, norms=True)
    b = handmade(cifar[:40], name="b", mask_from=2, experts=3, router="gmm", slots="padded", seed=1)
    return a, b


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
    for image, wish, answer in zip(cifar, wishes, together, strict=False):
        alone = engine_of(*(b for b in pair if b.name == wish.bundle)).predict([image], wish)
        same(alone[0], answer)


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
        "cascade.engine.engine.choose", lambda backbone, weight_cache, *_: CudaExecutor(backbone, weight_cache)
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


# --- memory


def one_mask(*bundles: Bundle, executor: Kind = "plain") -> int:
    """Bytes of the largest mask's weights."""
    engine = engine_of(*bundles, executor=executor)
    return max(engine.executor(bundle).size(mask) for bundle in bundles for mask in bundle.masks)


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


# --- every image its own wishes, and its own error


def refused(answer: Prediction | ItemError) -> str:
    assert isinstance(answer, ItemError), answer
    assert answer.message and len(answer.message.splitlines()) == 1
    assert json.loads(json.dumps(answer.to_json()))["error"]["message"] == answer.message
    return answer.kind


def test_an_error_is_one_images_own(pair: tuple[Bundle, Bundle], cifar: list[Image.Image], tmp_path: Path) -> None:
    single = handmade(cifar[:40], name="single", experts=0)
    engine = engine_of(*pair, single)
    file = tmp_path / "photo.png"
    cifar[5].save(file)
    raw = file.read_bytes()
    batch: list[tuple[Any, Options, str | None]] = [
        (cifar[0], Options(bundle="a"), None),
        (cifar[1], Options(bundle="nobody"), "unknown_bundle"),
        (cifar[2], Options(bundle="b", version="7"), "unknown_version"),
        (cifar[3], Options(bundle="b", mode="sideways"), "unknown_mode"),
        (cifar[3], Options(bundle="single", mode="unconditional"), "mode_missing"),
        (cifar[4], Options(), "bundle_missing"),
        (file, Options(bundle="b", version="1"), None),
        (str(file), Options(bundle="b", mode="dispatcher"), None),
        (raw, Options(bundle="single"), None),
        (b"", Options(bundle="a"), "empty"),
        (b"no image at all", Options(bundle="a"), "not_an_image"),
        (raw[:-400], Options(bundle="a"), "truncated"),
        (Image.open(BytesIO(raw[:-400])), Options(bundle="a"), "truncated"),
        (tmp_path / "missing.png", Options(bundle="a"), "unreadable"),
        (cifar[6], Options(bundle="b"), None),
    ]
    images, wishes, outcomes = zip(*batch, strict=True)
    with ThreadPoolExecutor(3) as pool:
        found = engine.predict(images, wishes, pool.map)
    assert len(found) == len(batch)
    for image, wish, outcome, answer in zip(images, wishes, outcomes, found, strict=True):
        if outcome is None:
            same(engine.predict([image], wish)[0], answer)
        else:
            assert refused(answer) == outcome
    same(found[6], engine.predict([cifar[5]], Options(bundle="b"))[0])


def test_errors_say_what_there_is(pair: tuple[Bundle, Bundle], cifar: list[Image.Image]) -> None:
    engine = engine_of(*pair, replace(pair[0], version="10"), replace(pair[0], version="9"))
    wishes = [Options(bundle="x"), Options(bundle="a", version="2"), Options(bundle="a", mode="x"), Options()]
    messages = [a.message for a in engine.predict(cifar[:4], wishes) if isinstance(a, ItemError)]
    assert messages == [
        "no such bundle; loaded: a b",
        "no such version; loaded: 1 9 10",
        "unknown mode; choose one of: dispatcher conditional unconditional",
        "say which bundle; loaded: a b",
    ]


def test_the_latest_version_is_the_greatest_number(pair: tuple[Bundle, Bundle], cifar: list[Image.Image]) -> None:
    versions = ("2", "10", "9", "draft", "²")
    engine = engine_of(*(named(pair[0], "a", v) for v in versions))
    assert engine.bundles == [("a", v) for v in ("draft", "²", "2", "9", "10")]
    (latest, second) = answers(engine, cifar[:1]) + answers(engine, cifar[:1], version="2")
    assert (latest.version, second.version) == ("10", "2")


def test_one_wish_for_all_or_one_each(pair: tuple[Bundle, Bundle], cifar: list[Image.Image]) -> None:
    engine = engine_of(pair[0])
    assert len(good(engine.predict(cifar[:3], Options(bundle="a")))) == 3
    with pytest.raises(CascadeError, match="3 images but 2 options; give one, or one for each"):
        engine.predict(cifar[:3], [Options(), Options()])
    assert engine.predict([]) == [] and engine.predict([], []) == []


@pytest.mark.parametrize(
    "one", ["cat.png", Path("cat.png"), b"\x89PNG", Image.new("RGB", (8, 8))], ids=lambda x: type(x).__name__
)
def test_one_image_instead_of_a_list(one: Any, pair: tuple[Bundle, Bundle]) -> None:
    with pytest.raises(CascadeError, match=r"takes a list of images: give \[image\] for one"):
        engine_of(pair[0]).predict(one)


def test_what_is_no_kind_of_image(pair: tuple[Bundle, Bundle], cifar: list[Image.Image]) -> None:
    engine = engine_of(pair[0])
    strange: list[Any] = [np.asarray(cifar[0]), 5, cifar[0]]
    array, number, image = engine.predict(strange)
    assert refused(array) == refused(number) == "not_an_image" and good([image])
    assert isinstance(array, ItemError) and "ndarray is no kind of image" in array.message


@pytest.mark.parametrize("device", ["cuda:99", "cuda:0x", "gpu"])
def test_a_device_that_is_not_there(device: str) -> None:
    with pytest.raises(CascadeError, match=f"there is no device {device} here: choose cpu"):
        Engine(device=device)


def test_without_any_bundle(cifar: list[Image.Image]) -> None:
    (answer,) = Engine().predict(cifar[:1])
    assert refused(answer) == "bundle_missing"


def test_what_is_asked_for_and_no_more(pair: tuple[Bundle, Bundle], cifar: list[Image.Image]) -> None:
    engine = engine_of(pair[0])
    plain, full, none, many = good(
        engine.predict(
            cifar[:1] * 4,
            [
                Options(),
                Options(embedding=True, labels=2, neighbors=3),
                Options(labels=0, neighbors=0),
                Options(labels=99, neighbors=99),
            ],
        )
    )
    assert plain.embedding is None and (len(plain.labels), len(plain.neighbors)) == (3, 5)
    assert full.embedding is not None and full.embedding.dtype == np.float32 and full.embedding.shape == (8,)
    assert (len(full.labels), len(full.neighbors)) == (2, 3)
    assert (none.labels, none.neighbors) == ((), ())
    assert (len(many.labels), len(many.neighbors)) == (3, 20)
    scores, nearest = [x.score for x in many.labels], [x.similarity for x in many.neighbors]
    assert scores == sorted(scores, reverse=True) and sum(scores) == pytest.approx(1, abs=1e-5)
    assert nearest == sorted(nearest, reverse=True) and all(-1.001 <= s <= 1.001 for s in nearest)
    assert {x.label for x in many.neighbors} == {"cat", "dog", "ship"}
    assert 0 <= plain.confidence <= 1 and 0 <= plain.ood <= 1


def test_an_answer_in_plain_types(pair: tuple[Bundle, Bundle], cifar: list[Image.Image]) -> None:
    with_it, without = answers(engine_of(pair[0]), cifar[:1]) + good(engine_of(pair[0]).predict(cifar[:1]))
    data = json.loads(json.dumps(with_it.to_json()))
    assert list(data) == [
        *("bundle", "version", "mode", "cluster", "confidence", "ood", "masks", "labels", "neighbors", "embedding")
    ]
    assert data["embedding"] == with_it.to_json()["embedding"] and len(data["embedding"]) == 8
    assert data["labels"][0].keys() == {"name", "score"}
    assert data["neighbors"][0].keys() == {"name", "label", "similarity"}
    assert "embedding" not in without.to_json()


# --- adding


def test_the_same_bundle_twice(pair: tuple[Bundle, Bundle]) -> None:
    engine = engine_of(pair[0])
    with pytest.raises(CascadeError, match="bundle a/1 is loaded already"):
        engine.add(pair[0])


def test_a_foreign_bundle_changes_nothing(pair: tuple[Bundle, Bundle], cifar: list[Image.Image]) -> None:
    engine = engine_of(pair[0])
    before = engine.stats()
    back = pair[1].card.backbone.model_copy(update={"fingerprint": "0" * 64})
    foreign = replace(pair[1], card=pair[1].card.model_copy(update={"backbone": back}))
    with pytest.raises(BundleError, match="bundle b/1 was trained on test_resnet with fingerprint 000000000000"):
        engine.add(foreign)
    short = replace(pair[1], dispatcher=replace(pair[1].dispatcher, bits=pair[1].dispatcher.bits[:-1]))
    with pytest.raises(BundleError, match="mask dispatcher has"):
        engine.add(short)
    assert engine.stats() == before
    assert len(answers(engine, cifar[:2])) == 2


def test_load(bundle_path: Path, tmp_path: Path, cifar: list[Image.Image]) -> None:
    engine = cascade.load(str(bundle_path), budget_bytes=2**24)
    assert engine.bundles == [("small", "1")] and engine.stats()["budget_bytes"] == 2**24
    with pytest.raises(BundleError, match="no bundle at"):
        cascade.load(tmp_path / "nowhere")


# --- many threads


def test_eight_threads_get_what_a_lone_one_gets(pair: tuple[Bundle, Bundle], cifar: list[Image.Image]) -> None:
    engine = engine_of(*pair, budget=one_mask(*pair))
    wishes = mixture("a", "b", count=30)
    want = [engine.predict([image], wish)[0] for image, wish in zip(cifar, wishes, strict=False)]
    engine = engine_of(*pair, budget=one_mask(*pair))
    found: list[tuple[int, Prediction | ItemError]] = []
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        random = Random(seed)
        try:
            for _ in range(3):
                rows = random.sample(range(30), random.randint(1, 6))
                out = engine.predict([cifar[i] for i in rows], [wishes[i] for i in rows])
                found.extend(zip(rows, out, strict=True))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len({row for row, _ in found}) > 15
    for row, answer in found:
        same(answer, want[row])


def test_bundles_come_while_others_are_asked(pair: tuple[Bundle, Bundle], cifar: list[Image.Image]) -> None:
    engine = engine_of(pair[0])
    want = answers(engine, cifar[:2], bundle="a", version="1")
    done = threading.Event()

    def add() -> None:
        for version in range(2, 12):
            engine.add(named(pair[0], "a", str(version)))
        done.set()

    adding = threading.Thread(target=add)
    adding.start()
    while not done.is_set():
        for a, b in zip(answers(engine, cifar[:2], bundle="a", version="1"), want, strict=True):
            same(a, b)
    adding.join()
    assert len(engine.bundles) == 11
    assert answers(engine, cifar[:1])[0].version == "11"
