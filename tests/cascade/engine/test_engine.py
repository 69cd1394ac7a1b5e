"""The engine: against a plain reference that builds each masked model separately, and whatever shares it."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from PIL import Image

import cascade
from cascade import Engine, ItemError, Options, Prediction
from cascade.bundle.format import Bundle, BundleError
from cascade.engine.executors.plain import PlainExecutor
from cascade.errors import CascadeError
from tests.helpers.answers import answers, good, mixture, same
from tests.helpers.bundles import handmade, named
from tests.helpers.engines import engine_of, one_mask


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
        "unknown mode; choose one of: dispatcher conditional unconditional fast adaptive full",
        "say which bundle, none has a domain to dispatch by; loaded: a b",
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
    with pytest.raises(CascadeError, match="3 images but 2 options; pass one, or one per image"):
        engine.predict(cifar[:3], [Options(), Options()])
    assert engine.predict([]) == [] and engine.predict([], []) == []


@pytest.mark.parametrize(
    "one", ["cat.png", Path("cat.png"), b"\x89PNG", Image.new("RGB", (8, 8))], ids=lambda x: type(x).__name__
)
def test_one_image_instead_of_a_list(one: Any, pair: tuple[Bundle, Bundle]) -> None:
    with pytest.raises(CascadeError, match=r"takes a list of images: pass \[image\] for one"):
        engine_of(pair[0]).predict(one)


def test_what_is_no_kind_of_image(pair: tuple[Bundle, Bundle], cifar: list[Image.Image]) -> None:
    engine = engine_of(pair[0])
    strange: list[Any] = [np.asarray(cifar[0]), 5, cifar[0]]
    array, number, image = engine.predict(strange)
    assert refused(array) == refused(number) == "not_an_image" and good([image])
    assert isinstance(array, ItemError) and "ndarray is no kind of image" in array.message


@pytest.mark.parametrize("device", ["cuda:99", "cuda:0x", "gpu"])
def test_a_device_that_is_not_there(device: str) -> None:
    with pytest.raises(CascadeError, match=f"this machine has no device {device}: choose cpu"):
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


def test_graphs_are_exported_apart_while_passes_run_only(
    cifar: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    exported: list[tuple[int, int]] = []
    monkeypatch.setattr(PlainExecutor, "export", lambda self, masks, *sizes: exported.append(sizes))
    engine = Engine(executor="plain")
    engine.add(handmade(cifar[:20], experts=0))
    engine.add(handmade(cifar[:20], name="before", experts=0))
    assert not exported, "nobody waits"
    engine.predict(cifar[:1], Options("hand"))
    engine.add(handmade(cifar[:20], name="after", experts=0))
    assert exported == [(64, 0)]
