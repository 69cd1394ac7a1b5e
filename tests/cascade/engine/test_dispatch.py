"""Dispatch between bundles, on real images: the right bundle, its very answer, and no pass that is not needed."""

import asyncio
import gc
import weakref
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from cascade import CascadeError, Engine, ItemError, Options, Prediction
from cascade.bundle.format import Bundle
from cascade.engine import dispatch as module
from cascade.engine.batcher import Batcher
from cascade.engine.deferral import surest
from cascade.engine.executors.plain import PlainExecutor
from cascade.engine.items import Item
from cascade.engine.results import Dispatch, Label
from cascade.engine.tenants import Tenant
from cascade.model import backbone as backbones
from tests.helpers.bundles import handmade, named
from tests.helpers.domains import late_and_early, with_domain
from tests.helpers.metrics import now

STAGE = 2


@pytest.fixture(scope="module")
def bundles(photos: list[Image.Image], clothes: list[Image.Image]) -> list[Bundle]:
    """One whose mask begins at the stage of dispatch, and one whose mask begins earlier."""
    return late_and_early(photos, clothes, STAGE)


def engine_of(bundles: Sequence[Bundle]) -> Engine:
    engine = Engine()
    for bundle in bundles:
        engine.add(bundle)
    return engine


@pytest.fixture
def engine(bundles: list[Bundle]) -> Engine:
    return engine_of(bundles)


def answered(answers: Sequence[Prediction | ItemError]) -> list[Prediction]:
    good = [answer for answer in answers if isinstance(answer, Prediction)]
    assert len(good) == len(answers), answers
    return good


def same(a: Prediction, b: Prediction) -> None:
    """Equal but for the reason of the dispatch, to the last bit."""
    assert a.embedding is not None and b.embedding is not None
    np.testing.assert_array_equal(a.embedding, b.embedding)
    assert replace(a, embedding=None, dispatch=None) == replace(b, embedding=None, dispatch=None)


def test_an_image_finds_its_bundle(engine: Engine, photos: list[Image.Image], clothes: list[Image.Image]) -> None:
    found = engine.predict([*photos[200:240], *clothes[200:240]])
    answers = [answer for answer in found if isinstance(answer, Prediction)]
    assert len(answers) >= 78, "one in a hundred may look unknown"
    want = ["photos"] * 40 + ["clothes"] * 40
    assert sum(isinstance(a, Prediction) and a.bundle == w for a, w in zip(found, want, strict=True)) >= 74
    for answer in answers:
        assert answer.dispatch is not None
        assert answer.dispatch.likely[0].name == answer.bundle
        assert sum(label.score for label in answer.dispatch.likely) == pytest.approx(1, abs=1e-5)
        assert answer.dispatch.repeated_stages == (0 if answer.bundle == "photos" else STAGE)
    assert np.mean([a.dispatch.confidence for a in answers if a.dispatch]) > 0.9


@pytest.mark.parametrize("name", ["photos", "clothes"])
def test_the_answer_is_that_of_the_named_bundle(
    engine: Engine, photos: list[Image.Image], clothes: list[Image.Image], name: str
) -> None:
    image = {"photos": photos, "clothes": clothes}[name][205]
    (found,) = answered(engine.predict([image], Options("auto", embedding=True)))
    (asked,) = answered(engine.predict([image], Options(name, embedding=True)))
    assert found.bundle == name and found.dispatch is not None and asked.dispatch is None
    same(found, asked)


def test_the_trunk_runs_once(engine: Engine, photos: list[Image.Image], monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask of ``photos`` begins where the dispatch ends: its pass continues there."""
    runs: list[tuple[int, int | None, int]] = []
    plain = PlainExecutor.run

    def run(self: PlainExecutor, x, start=0, stop=None):  # type: ignore[no-untyped-def]
        runs.append((start, stop, len(x)))
        return plain(self, x, start, stop)

    (item,) = [engine.prepare(photos[205])]
    assert not isinstance(item, ItemError)
    monkeypatch.setattr(type(engine.executor(engine.loaded[0])), "run", run)
    answered(engine.run([item] * 3))
    assert runs[0] == (0, STAGE, 3) and [start for start, _, _ in runs].count(0) == 1, runs


def test_only_where_the_caller_may_go(engine: Engine, photos: list[Image.Image]) -> None:
    among = Options(among=frozenset({"clothes"}), dispatch="image")
    (answer,) = engine.predict([photos[205]], among)
    assert isinstance(answer, ItemError) and answer.kind == "unknown_domain", "a photo is no piece of clothing"
    (answer,) = engine.predict([photos[205]], Options(among=frozenset({"photos"})))
    assert isinstance(answer, Prediction) and answer.bundle == "photos"
    assert answer.dispatch is not None and answer.dispatch.confidence == pytest.approx(1)
    (nothing,) = engine.predict([photos[205]], Options(among=frozenset()))
    assert isinstance(nothing, ItemError) and nothing.kind == "unknown_domain"


def test_what_fits_nowhere_is_unknown(bundles: list[Bundle], photos: list[Image.Image]) -> None:
    engine = engine_of([bundles[1], named(bundles[1], "others")])
    before = now("dispatched_total", bundle="unknown")
    (answer,) = engine.predict([photos[205]])
    assert isinstance(answer, ItemError) and answer.kind == "unknown_domain"
    assert now("dispatched_total", bundle="unknown") == before + 1
    with pytest.raises(CascadeError, match="unknown_domain"):
        engine.predict([photos[205]], on_error="raise")


def test_the_frozen_backbones_embedding_of_what_fits_nowhere(
    bundles: list[Bundle], photos: list[Image.Image], clothes: list[Image.Image]
) -> None:
    """In one pass with images that fit."""
    engine, images = engine_of(bundles[1:]), [photos[205], clothes[205]]
    options = Options("auto", unknown="embedding")
    before = now("requests_total", bundle="unknown", cluster="none", outcome="ok")
    found, known = answered(engine.predict(images, options))
    assert now("requests_total", bundle="unknown", cluster="none", outcome="ok") == before + 1
    assert known.bundle == "clothes" and known.labels and known.embedding is None
    assert (found.bundle, found.version, found.cluster, found.labels, found.masks) == ("", "", -1, (), ())
    assert (found.confidence, found.ood) == (0.0, 1.0)
    assert found.dispatch is not None and found.dispatch.confidence == 0.0
    assert [label.name for label in found.dispatch.likely] == ["clothes"]
    with torch.inference_mode():
        pixels = bundles[1].preprocessing.transform()(photos[205])
        wanted = backbones.load("test_resnet", "random:0").model(pixels[None])[0].numpy()
    assert found.embedding is not None
    np.testing.assert_allclose(found.embedding, wanted, atol=1e-4)

    with Batcher(engine) as batcher:
        again, _ = answered(asyncio.run(batcher.answers(images, options, 30)))
    assert replace(again, embedding=None) == replace(found, embedding=None)
    as_set = replace(options, dispatch="set")
    (alone,) = answered(engine.predict(images[:1], as_set))
    assert alone.bundle == "", "no bundle has a majority"
    sent = answered(engine.predict([*images, clothes[206]], as_set))
    assert [answer.bundle for answer in sent] == ["clothes"] * 3
    (hidden,) = answered(engine.predict(images[:1], replace(options, among=frozenset())))
    assert hidden.dispatch is not None and hidden.dispatch.likely == ()


@pytest.fixture
def contested(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every image is."""
    monkeypatch.setattr(module, "CONTESTED", 1.1)


def by_chances(monkeypatch: pytest.MonkeyPatch, **chances: float) -> None:
    """Let every image be as likely as this to be of each bundle."""
    settle = module._settle

    def given(table, item, likely, trunks, loaded):  # type: ignore[no-untyped-def]
        column = {target.name: n for n, (_, target) in enumerate(table.columns)}
        return settle(table, item, [(column[name], chance) for name, chance in chances.items()], trunks, loaded)

    monkeypatch.setattr(module, "_settle", given)


@pytest.mark.usefixtures("contested")
def test_by_default_a_contested_image_asks_two(engine: Engine, photos: list[Image.Image]) -> None:
    answers = [answered(engine.predict([photos[205]], Options(name)))[0] for name in ("auto", "photos", "clothes")]
    assert answers[0].dispatch is not None and answers[0].dispatch.passes == 3, "one of them has experts"
    chance = {label.name: label.score for label in answers[0].dispatch.likely}
    surest = max(answers[1:], key=lambda answer: chance[answer.bundle] * answer.labels[0].score)
    assert answers[0].labels == surest.labels and answers[0].bundle == surest.bundle


def test_a_contested_image_counts_once_for_the_bundle_that_answers(
    engine: Engine, photos: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    photo, cloth = (answered(engine.predict([photos[205]], Options(n)))[0] for n in ("photos", "clothes"))
    likelier, other = sorted((photo, cloth), key=lambda answer: answer.labels[0].score)
    by_chances(monkeypatch, **{likelier.bundle: 0.501, other.bundle: 0.499})
    before = {name: now("dispatched_total", bundle=name) for name in ("photos", "clothes")}
    (answer,) = answered(engine.predict([photos[205]]))
    assert answer.bundle == other.bundle and answer.dispatch is not None and answer.dispatch.confidence == 0.499
    assert answer.dispatch.likely[0].name == likelier.bundle
    counted = {name: now("dispatched_total", bundle=name) - old for name, old in before.items()}
    assert counted == {other.bundle: 1, likelier.bundle: 0}


@pytest.mark.usefixtures("contested")
@pytest.mark.parametrize(
    "options",
    [Options(dispatch="image"), Options(labels=0), Options(mode="conditional")],
    ids=["image", "no labels", "mode"],
)
def test_only_the_likeliest_is_asked(engine: Engine, photos: list[Image.Image], options: Options) -> None:
    """By request, without labels to compare, and if the other one does not have the mode."""
    (answer,) = answered(engine.predict([photos[205]], options))
    assert answer.bundle == "photos" and answer.dispatch is not None and answer.dispatch.passes == 2


def test_a_bundle_without_labels_is_not_outvoted(
    bundles: list[Bundle], photos: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it outvote the one that is likelier."""
    engine = engine_of([replace(bundles[0], linear={}), bundles[1]])
    for likelier, other in (("photos", "clothes"), ("clothes", "photos")):
        by_chances(monkeypatch, **{likelier: 0.6, other: 0.4})
        (answer,) = answered(engine.predict([photos[205]]))
        assert answer.bundle == likelier
        monkeypatch.undo()


@pytest.mark.usefixtures("contested")
def test_the_passes_of_both_bundles_are_charged(engine: Engine, photos: list[Image.Image]) -> None:
    with Batcher(engine) as batcher:
        answered([future.result(30) for future in batcher.submit_all(photos[205:208], tenant=Tenant("one"))])
        (flow,) = batcher._waiting._levels["interactive"]._flows.values()
    assert flow.served == 3 * (1 + 2 + 1), "dispatch, a cascade, and a single mask"


def test_of_two_answers_the_likelier_label_of_the_likelier_bundle(engine: Engine, photos: list[Image.Image]) -> None:
    """A bundle with an easy task is always surer of its labels than one with a hard task."""
    names = ("photos", "clothes")
    items = [item for name in names if isinstance(item := engine.prepare(photos[205], Options(name)), Item)]
    answers = answered(engine.run(items))

    def chosen(*chances: tuple[float, float]) -> str:
        own = [replace(i, dispatch=Dispatch(bundle, (), 0)) for i, (bundle, _) in zip(items, chances, strict=True)]
        seen = [replace(a, labels=(Label("x", label),)) for a, (_, label) in zip(answers, chances, strict=True)]
        return surest(own, seen)[1].bundle

    assert chosen((0.7, 0.5), (0.3, 0.99)) == "photos"
    assert chosen((0.6, 0.3), (0.4, 0.9)) == "clothes"
    unlabeled = [replace(answer, labels=()) for answer in answers]
    assert surest(items, unlabeled)[1].bundle == "photos", "the first one is the likelier"


def test_a_set_goes_where_most_of_it_fits(
    engine: Engine, photos: list[Image.Image], clothes: list[Image.Image]
) -> None:
    mixed = [*photos[200:206], clothes[200], clothes[201]]
    answers = answered(engine.predict(mixed, Options(dispatch="set")))
    assert {answer.bundle for answer in answers} == {"photos"}
    with Batcher(engine) as batcher:
        again = asyncio.run(batcher.answers(mixed, Options(dispatch="set"), 30))
    assert {answer.bundle for answer in answered(again)} == {"photos"}


def test_the_batcher_dispatches(engine: Engine, photos: list[Image.Image], clothes: list[Image.Image]) -> None:
    with Batcher(engine) as batcher:
        futures = [
            batcher.submit(image) for pair in zip(photos[200:210], clothes[200:210], strict=True) for image in pair
        ]
        answers = answered([future.result(30) for future in futures])
    assert [answer.bundle for answer in answers] == ["photos", "clothes"] * 10


def test_bundles_of_other_input_sizes_take_part(
    bundles: list[Bundle], photos: list[Image.Image], clothes: list[Image.Image]
) -> None:
    larger = with_domain(handmade(clothes[:40], name="large", size=96, experts=0), clothes[:200], STAGE)
    engine = engine_of([bundles[0], larger])
    answers = answered(engine.predict([*photos[200:220], *clothes[200:220]]))
    names = [answer.bundle for answer in answers]
    assert names[:20].count("photos") >= 19 and names[20:].count("large") >= 19


def test_older_bundles_answer_bit_for_bit_as_before(
    engine: Engine, bundles: list[Bundle], photos: list[Image.Image], clothes: list[Image.Image]
) -> None:
    """Twenty bundles come and ten of them go; nobody who named a bundle, or is sent to one, notices."""
    images = {"photos": photos[200:250], "clothes": clothes[200:250]}

    def ask() -> dict[str, list[Prediction]]:
        return {n: answered(engine.predict(own, Options(n, embedding=True))) for n, own in images.items()}

    before = ask()
    single = with_domain(handmade(photos[:40], mask_from=STAGE, experts=0, seed=7), photos[:100], STAGE)
    for i in range(20):
        engine.add(named(single, f"new-{i}"))
        if i % 2:
            engine.remove(f"new-{i}", "1")
    for name, answers in ask().items():
        for a, b in zip(before[name], answers, strict=True):
            same(a, b)
    dispatched = answered(engine.predict(clothes[200:250], Options(embedding=True)))
    for a, b in zip(before["clothes"], dispatched, strict=True):
        if b.bundle == "clothes":
            same(a, b)
    assert sum(b.bundle == "clothes" for b in dispatched) >= 48


def test_a_new_bundle_is_found_at_once_and_a_removed_one_never(
    bundles: list[Bundle], photos: list[Image.Image]
) -> None:
    engine = engine_of(bundles[1:])
    (only,) = engine.predict([photos[205]], Options("auto"))
    assert isinstance(only, ItemError) and only.kind == "unknown_domain"
    added = replace(bundles[0], version="2")
    gone = weakref.ref(added)
    engine.add(added)
    (found,) = answered(engine.predict([photos[205]]))
    assert found.bundle == "photos"
    engine.remove("photos", "2")
    (only,) = engine.predict([photos[205]], Options("auto"))
    assert isinstance(only, ItemError)
    del added
    gc.collect()
    assert gone() is None, "the table must not keep it"


def test_bundles_without_a_domain_must_be_named(bundles: list[Bundle], photos: list[Image.Image]) -> None:
    bare = [replace(bundle, domain=None, card=bundle.card.model_copy(update={"domain": None})) for bundle in bundles]
    (answer,) = engine_of(bare).predict([photos[0]])
    assert isinstance(answer, ItemError) and answer.kind == "bundle_missing" and "photos" in answer.message
    (answer,) = engine_of([bare[0], bundles[1]]).predict([photos[0]], Options("photos"))
    assert isinstance(answer, Prediction)
