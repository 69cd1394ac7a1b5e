"""The registry: what can be loaded is, what can't is refused by name, and passes go on whatever the store does."""

import gc
import logging
import shutil
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import fsspec
import psutil
import pytest
import torch
from PIL import Image
from prometheus_client import REGISTRY

from cascade import Engine, ItemError, Options, Prediction
from cascade.bundle.format import Bundle, write
from cascade.bundle.store import Identity
from cascade.engine import registry as registries
from cascade.engine.items import Item
from cascade.engine.journal import Journal
from cascade.engine.pins import pinned
from cascade.engine.registry import Registry, State
from cascade.engine.stores import load_store
from cascade.errors import CascadeError
from cascade.model import backbone as backbones
from tests.helpers.bundles import handmade, named

Watched = tuple[Engine, Registry]


@pytest.fixture(scope="module")
def hand(cifar: list[Image.Image]) -> Bundle:
    return handmade(cifar[:40], experts=0)


@pytest.fixture(scope="module")
def other(cifar: list[Image.Image]) -> Bundle:
    """Over another backbone."""
    return handmade(cifar[:40], experts=2, source="random:1")


@pytest.fixture
def store(hand: Bundle, tmp_path: Path) -> Path:
    """Three good bundles; one with a flipped byte, one half copied, one foreign, one without weights, one hidden."""
    root = tmp_path / "store"
    for path in ("a/1", "a/2", "b/1", "corrupt/1", "half/1"):
        write(hand, root / path)
    flip(root / "corrupt/1/masks.safetensors")
    (root / "half/1/fusion.safetensors").unlink()
    back = hand.card.backbone.model_copy(update={"fingerprint": "1" * 64})
    write(replace(hand, card=hand.card.model_copy(update={"backbone": back})), root / "foreign/1")
    elsewhere = hand.card.backbone.model_copy(update={"fingerprint": "2" * 64, "source": "file:gone.safetensors"})
    write(replace(hand, card=hand.card.model_copy(update={"backbone": elsewhere})), root / "lost/1")
    shutil.copytree(root / "a/1", root / "a/.3.99.tmp")
    return root


@pytest.fixture
def small(hand: Bundle, tmp_path: Path) -> Path:
    """A store of one good bundle, ``a/1``."""
    write(hand, tmp_path / "small/a/1")
    return tmp_path / "small"


def flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 16
    file.write_bytes(raw)


def states(registry: Registry) -> dict[str, str]:
    return {f"{s.name}/{s.version}": s.state for s in registry.states()}


def ask(engine: Engine, image: Image.Image, **wish: str) -> str:
    """The version that answers, or the kind of the error."""
    (answer,) = engine.predict([image], Options(**wish))  # type: ignore[arg-type]
    return answer.kind if isinstance(answer, ItemError) else answer.version


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [r.getMessage() for r in caplog.records if r.name == "cascade.engine.registry" and r.levelno > logging.INFO]
    caplog.clear()
    return found


def gauge(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(f"cascade_{name}", labels)


# --- what is loaded, and what is refused


def test_loads_the_good_and_refuses_the_bad_by_name(
    store: Path, cifar: list[Image.Image], caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine()
    registry = load_store(engine, store)
    assert engine.bundles == [("a", "1"), ("a", "2"), ("b", "1")]
    reasons = {s.name: s.reason or "" for s in registry.states() if s.state == "refused"}
    assert list(reasons) == ["corrupt", "foreign", "half", "lost"]
    assert "masks.safetensors: its checksum differs from SHA256SUMS" in reasons["corrupt"]
    assert "bundle foreign/1 was trained on test_resnet with fingerprint 111111111111" in reasons["foreign"]
    assert "(fusion.safetensors); copy the whole bundle again" in reasons["half"]
    assert "no weights at gone.safetensors; pass the checkpoint with --weights FILE" in reasons["lost"]
    assert not [reason for reason in reasons.values() if "\n" in reason]
    assert not [reason for reason in reasons.values() if str(store.parent) in reason], "no path of this machine"
    assert reasons["corrupt"].startswith("corrupt/1/masks.safetensors: ")
    assert registry.states("b") == [State("b", "1", "ready")]
    assert all(isinstance(a, Prediction) for a in engine.predict(cifar[:2], [Options(bundle="a"), Options(bundle="b")]))
    logged = lines(caplog)
    assert [line.split(":")[0] for line in logged] == [f"refused bundle {name}/1" for name in reasons]
    assert str(store / "corrupt/1/masks.safetensors") in logged[0], "who runs the server is told where"
    assert [gauge("bundle_refused", bundle=name) for name in reasons] == [1] * 4
    assert (gauge("bundles", state="ready"), gauge("bundles", state="refused")) == (3, 4)
    assert engine.stats()["backbones"] == 1, "nothing of the refused stays"


def test_an_empty_store(tmp_path: Path) -> None:
    with pytest.raises(CascadeError, match=r"no bundle could be loaded .*: put bundles at .*/<name>/<version>/"):
        load_store(Engine(), tmp_path)
    with pytest.raises(CascadeError, match=r"no bundle could be loaded .*nowhere: No such file .* is it mounted\?"):
        load_store(Engine(), tmp_path / "nowhere")


def test_a_store_of_nothing_but_bad_ones(store: Path) -> None:
    for good in ("a", "b"):
        shutil.rmtree(store / good)
    with pytest.raises(CascadeError, match="no bundle could be loaded from .*masks.safetensors: its checksum") as error:
        load_store(Engine(), store)
    assert "\n" not in str(error.value)


def test_a_bad_one_is_read_again_when_it_changed(
    hand: Bundle, small: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine()
    registry = load_store(engine, small)
    write(hand, small / "a/2")
    shutil.copy(small / "a/2/masks.safetensors", small / "kept")
    flip(small / "a/2/masks.safetensors")
    reads: list[tuple[str, ...]] = []
    read = registry.store.read

    def counted(name: str, version: str, memory: int | None) -> tuple[Bundle, str]:
        reads.append((name, version))
        return read(name, version, memory)

    monkeypatch.setattr(registry.store, "read", counted)
    for _ in range(3):
        registry.reload()
    assert reads == [("a", "2")] and states(registry) == {"a/1": "ready", "a/2": "refused"}
    assert len(lines(caplog)) == 1 and gauge("bundle_refused", bundle="a") == 1
    shutil.move(small / "kept", small / "a/2/masks.safetensors")
    registry.reload()
    assert len(reads) == 2 and states(registry) == {"a/1": "ready", "a/2": "ready"}
    assert gauge("bundle_refused", bundle="a") == 0


def test_half_copied_becomes_whole(hand: Bundle, small: Path, tmp_path: Path, cifar: list[Image.Image]) -> None:
    engine = Engine()
    registry = load_store(engine, small)
    files = sorted(write(hand, tmp_path / "from/a/2").iterdir())
    (small / "a/2").mkdir()
    for file in files:
        registry.reload()
        assert states(registry).get("a/2") != "ready" and ask(engine, cifar[0]) == "1"
        shutil.copy(file, small / "a/2")
    registry.reload()
    assert ask(engine, cifar[0]) == "2"


def test_a_version_is_never_overwritten(hand: Bundle, small: Path, cifar: list[Image.Image]) -> None:
    engine = Engine()
    registry = load_store(engine, small)
    shutil.copytree(small / "a/1", small / "kept")
    shutil.rmtree(small / "a/1")
    write(replace(hand, card=hand.card.model_copy(update={"training": {"other": 1}})), small / "a/1")
    registry.reload()
    (state,) = registry.states()
    assert state.state == "ready" and "publish changes as a new version" in (state.reason or "")
    assert gauge("bundle_refused", bundle="a") == 1 and ask(engine, cifar[0]) == "1"
    flip(small / "a/1/masks.safetensors")
    registry.reload()
    (state,) = registry.states()
    assert state.state == "ready" and "checksum" in (state.reason or "") and ask(engine, cifar[0]) == "1"
    shutil.rmtree(small / "a/1")
    shutil.move(small / "kept", small / "a/1")  # the same bytes, other dates
    registry.reload()
    assert registry.states() == [State("a", "1", "ready")] and gauge("bundle_refused", bundle="a") == 0


def test_what_cannot_answer_is_refused(
    hand: Bundle, small: Path, cifar: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers may be finite and overflow in a pass; here NaN stands for them."""
    monkeypatch.setattr("cascade.bundle.format.inconsistencies", lambda bundle: ())
    engine = Engine()
    registry = load_store(engine, small)
    bad = {m: replace(f, bias=f.bias * float("nan")) for m, f in hand.fusions.items()}
    write(replace(hand, fusions=bad), small / "a/2")
    registry.reload()
    assert "answers with NaN or infinity" in (registry.states("a")[1].reason or "")
    assert ask(engine, cifar[0]) == "1" and ask(engine, cifar[0], version="2") == "unknown_version"


def test_a_version_is_replaced_where_memory_holds_one(hand: Bundle, small: Path, cifar: list[Image.Image]) -> None:
    engine = Engine()
    registry = load_store(engine, small)
    engine.resident.memory_bytes = engine.stats()["backbone_bytes"] + engine.stats()["packed_bytes"]
    write(hand, small / "b/1")
    registry.reload()
    assert [s.out_of_memory for s in registry.states("b")] == [True]
    write(hand, small / "a/2")
    shutil.rmtree(small / "a/1")
    registry.reload()
    assert engine.bundles == [("a", "2")] and ask(engine, cifar[0], bundle="a") == "2"


def with_a_broken_newer_version(hand: Bundle, small: Path) -> tuple[Engine, Registry]:
    """A store whose bundle ``a`` was replaced by version 2 on the disk, which is damaged."""
    engine = Engine()
    registry = load_store(engine, small)
    write(hand, small / "a/2")
    flip(small / "a/2/masks.safetensors")
    shutil.rmtree(small / "a/1")
    registry.reload()
    return engine, registry


def test_the_old_version_serves_until_a_new_one_is_loaded(hand: Bundle, small: Path, cifar: list[Image.Image]) -> None:
    engine, registry = with_a_broken_newer_version(hand, small)
    old, _ = registry.states("a")
    assert ask(engine, cifar[0]) == "1" and "until another version is loaded" in (old.reason or "")
    shutil.rmtree(small / "a/2")
    write(hand, small / "a/2")
    registry.reload()
    assert engine.bundles == [("a", "2")]


def test_it_ends_with_its_name(hand: Bundle, small: Path, cifar: list[Image.Image]) -> None:
    """That is how to take a bundle away while a newer version of it is refused."""
    write(hand, small / "b/1")
    engine, registry = with_a_broken_newer_version(hand, small)
    assert engine.bundles == [("a", "1"), ("b", "1")]
    shutil.rmtree(small / "a")
    registry.reload()
    assert engine.bundles == [("b", "1")] and ask(engine, cifar[0], bundle="a") == "unknown_bundle"


def test_a_bundle_behind_a_link_has_its_name_in_the_store(
    hand: Bundle, small: Path, tmp_path: Path, cifar: list[Image.Image]
) -> None:
    write(hand, tmp_path / "releases/abc")
    (small / "linked").mkdir()
    (small / "linked/3").symlink_to(tmp_path / "releases/abc")
    (small / "alias").symlink_to(small / "a")
    engine = Engine()
    registry = load_store(engine, small)
    assert engine.bundles == [("a", "1"), ("alias", "1"), ("linked", "3")]
    shutil.rmtree(small / "linked")
    registry.reload()
    assert ask(engine, cifar[0], bundle="linked") == "unknown_bundle"


def test_a_defect_while_loading_refuses_one_bundle(
    hand: Bundle, small: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What a library raises over files, or for the lack of memory, and no check of ours foresaw."""
    engine = Engine()
    registry = load_store(engine, small)
    write(hand, small / "a/2")
    monkeypatch.setattr(engine.resident, "_try", lambda bundle: torch.zeros(2) @ torch.zeros(3))
    held = engine.stats()
    registry.reload()
    assert states(registry) == {"a/1": "ready", "a/2": "refused"} and engine.stats() == held
    assert "can't be used (RuntimeError)" in (registry.states("a")[1].reason or "")
    assert [bool(r.exc_info) for r in caplog.records] == [True, False], "a traceback, then the refusal"
    now = time.monotonic() + registries.RETRY + 1
    monkeypatch.setattr(registries.time, "monotonic", lambda: now)
    registry.reload()
    assert len(caplog.records) == 2, "tried again, said once"
    monkeypatch.undo()
    registry._bad = {i: replace(b, again=0.0) for i, b in registry._bad.items()}
    registry.reload()
    assert states(registry) == {"a/1": "ready", "a/2": "ready"}


# --- versions


def test_latest_pinned_and_back(
    hand: Bundle, small: Path, cifar: list[Image.Image], caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine()
    registry = load_store(engine, small, pinned(["b@1"]))
    assert "b is pinned to version 1, which is not there" in caplog.text
    for name, version in (("a", "9"), ("a", "10"), ("b", "1"), ("b", "2")):
        write(hand, small / name / version)
    registry.reload()
    assert ask(engine, cifar[0], bundle="a") == "10", "versions are numbers"
    assert ask(engine, cifar[0], bundle="b") == "1", "pinned"
    assert ask(engine, cifar[0], bundle="b", version="2") == "2", "named by the request"
    shutil.rmtree(small / "a/10")
    shutil.rmtree(small / "b/1")
    registry.reload()
    assert ask(engine, cifar[0], bundle="a") == "9"
    assert ask(engine, cifar[0], bundle="b") == "unknown_version"
    assert states(registry) == {"a/1": "ready", "a/9": "ready", "a/10": "removed", "b/1": "removed", "b/2": "ready"}
    write(hand, small / "a/10")
    registry.reload()
    assert states(registry)["a/10"] == "ready"


def test_pinned_while_serving(hand: Bundle, small: Path) -> None:
    for version in ("1", "2"):
        write(hand, small / "b" / version)
    engine, journal = Engine(), Journal()
    registry = load_store(engine, small, pinned(["b@1"]), journal=journal)

    def answering() -> str:
        found = engine.find("b")
        return found.kind if isinstance(found, ItemError) else found.version

    assert answering() == "1"
    registry.pin("b", "2")
    assert answering() == "2"
    assert load_store(other := Engine(), small, pinned(["b@1"]), journal=journal) and other.pins == engine.pins
    registry.pin("b", None)
    assert answering() == "2" and not engine.pins, "the latest"
    assert load_store(other := Engine(), small, pinned(["b@1"]), journal=journal) and not other.pins
    for text, message in (("9", "has no version 9"), ("1:9,7:1", "has no version 7"), ("1:x", "can't pin")):
        with pytest.raises(CascadeError, match=message):
            registry.pin("b", text)
    with pytest.raises(CascadeError, match="has no version 1"):
        registry.pin("nothing", "1")
    assert not engine.pins and answering() == "2"


@pytest.mark.parametrize("text", ["demo", "@3", "demo@", ""])
def test_pins_that_make_no_sense(text: str) -> None:
    with pytest.raises(CascadeError, match="NAME@VERSION"):
        pinned([text])


def test_versions_come_and_go_under_load(hand: Bundle, small: Path, cifar: list[Image.Image]) -> None:
    """Every answer is the one that its version gives; none fails."""
    marked = {v: replace(hand.fusions["dispatcher"], bias=torch.full((8,), 100.0 * v)) for v in (1, 2)}
    shutil.rmtree(small / "a")
    whole = {v: write(replace(hand, fusions={"dispatcher": f}), small / f"a/{v}") for v, f in marked.items()}
    shutil.move(whole[2], small / ".aside")
    engine = Engine()
    registry = load_store(engine, small)
    done = threading.Event()
    seen: list[tuple[str, int]] = []
    wrong: list[object] = []

    def client() -> None:
        while not done.is_set():
            for answer in engine.predict(cifar[:2], Options(embedding=True)):
                if isinstance(answer, Prediction) and answer.embedding is not None:
                    seen.append((answer.version, round(float(answer.embedding.mean()) / 100)))
                else:
                    wrong.append(answer)

    clients = [threading.Thread(target=client) for _ in range(3)]
    for thread in clients:
        thread.start()
    try:
        for _ in range(5):
            for source, target in ((small / ".aside", whole[2]), (whole[2], small / ".aside")):
                shutil.move(source, target)
                registry.reload()
                before = len(seen)
                while len(seen) < before + 10:
                    time.sleep(0.01)
    finally:
        done.set()
        for thread in clients:
            thread.join()
    assert not wrong and {version for version, _ in seen} == {"1", "2"}
    assert all(int(version) == mark for version, mark in seen)


# --- passes go on


def test_loading_a_backbone_holds_up_no_pass(
    other: Bundle, small: Path, monkeypatch: pytest.MonkeyPatch, cifar: list[Image.Image]
) -> None:
    engine = Engine()
    registry = load_store(engine, small)
    write(other, small / "b/1")
    entered, leave, load = threading.Event(), threading.Event(), backbones.load

    def slow(*args: object, **kwargs: object) -> backbones.Backbone:
        entered.set()
        assert leave.wait(30)
        return load(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(backbones, "load", slow)
    loader = threading.Thread(target=registry.reload)
    loader.start()
    try:
        assert entered.wait(30)
        assert ask(engine, cifar[0]) == "1"
        assert states(registry) == {"a/1": "ready", "b/1": "loading"}
        assert ask(engine, cifar[0], bundle="b") == "unknown_bundle"
    finally:
        leave.set()
        loader.join()
    assert ask(engine, cifar[0], bundle="b") == "1"


def test_removal_waits_for_its_requests(hand: Bundle, other: Bundle, small: Path, cifar: list[Image.Image]) -> None:
    write(other, small / "b/1")
    engine = Engine()
    registry = load_store(engine, small)
    before = engine.stats()
    assert before["backbones"] == 2
    backbone = weakref.ref(
        next(e for f, e in engine.resident.executors.items() if f == other.card.backbone.fingerprint).backbone
    )
    waiting = [engine.prepare(cifar[0], Options(bundle="b")) for _ in range(2)]
    items = [item for item in waiting if isinstance(item, Item)]
    del waiting
    shutil.rmtree(small / "b")
    registry.reload()
    assert states(registry) == {"a/1": "ready", "b/1": "removed"}
    assert ask(engine, cifar[0], bundle="b") == "unknown_bundle"
    assert engine.stats()["backbones"] == 2, "two requests still need it"
    assert [answer.bundle for answer in engine.run(items) if isinstance(answer, Prediction)] == ["b", "b"]
    items.clear()
    registry.reload()
    engine.predict(cifar[:1], Options(bundle="a"))
    after = engine.stats()
    assert after["backbones"] == 1 and after["backbone_bytes"] < before["backbone_bytes"]
    assert after["materialized_bytes"] < before["materialized_bytes"]
    gc.collect()
    assert backbone() is None, "its memory is free"
    write(other, small / "b/2")
    registry.reload()
    assert ask(engine, cifar[0], bundle="b") == "2"


def test_remove_says_what_is_not_there() -> None:
    with pytest.raises(CascadeError, match="bundle a/1 is not loaded"):
        Engine().remove("a", "1")


# --- many, and within the memory


def test_two_hundred_bundles_over_one_backbone(hand: Bundle, tmp_path: Path, cifar: list[Image.Image]) -> None:
    whole = write(hand, tmp_path / "store/b000/1")
    for i in range(1, 200):
        shutil.copytree(whole, tmp_path / f"store/b{i:03}/1")
    process = psutil.Process()
    engine = Engine(budget_bytes=8 * 2**20)
    start, memory = time.process_time(), process.memory_info().rss
    registry = load_store(engine, tmp_path / "store")
    seconds, grown = time.process_time() - start, process.memory_info().rss - memory
    stats = engine.stats()
    assert (stats["bundles"], stats["backbones"]) == (200, 1)
    print(f"200 bundles: {seconds:.1f} s of CPU, {grown / 2**20:.0f} MB grown, {stats}")
    assert stats["packed_bytes"] == 200 * hand.bytes()
    assert grown < stats["packed_bytes"] + stats["backbone_bytes"] + stats["budget_bytes"] + 100 * 2**20
    start = time.process_time()
    registry.reload()
    assert time.process_time() - start < seconds / 2, "a look at an unchanged store reads no bundle"
    asked = [Options(bundle=f"b{i:03}") for i in range(0, 200, 10)]
    assert {getattr(a, "bundle", a) for a in engine.predict([cifar[0]] * 20, asked)} == {o.bundle for o in asked}


def test_backbones_side_by_side_within_a_budget(
    hand: Bundle, other: Bundle, small: Path, monkeypatch: pytest.MonkeyPatch, cifar: list[Image.Image]
) -> None:
    probe = Engine()
    for bundle in (named(hand, "a"), named(other, "b")):
        probe.add(bundle)
    stats = probe.stats()
    need = stats["backbone_bytes"] + stats["packed_bytes"]
    write(other, small / "b/1")
    engine = Engine(memory_bytes=need)
    assert states(load_store(engine, small)) == {"a/1": "ready", "b/1": "ready"}

    engine = Engine(memory_bytes=need - 1)
    registry = load_store(engine, small)
    assert states(registry) == {"a/1": "ready", "b/1": "refused"}
    reason = registry.states("b")[0].reason or ""
    assert reason.startswith("bundle b/1 needs ") and f"of {need - 1} are taken: give more" in reason
    assert engine.stats()["backbones"] == 1 and ask(engine, cifar[0]) == "1"
    write(replace(other, name="c"), small / "c/1")
    shutil.rmtree(small / "a")
    registry.reload()
    registry.reload()  # there is room now
    assert states(registry)["b/1"] == "ready"


# --- a store out of reach, and time


def test_a_store_out_of_reach_costs_nothing(
    hand: Bundle, small: Path, cifar: list[Image.Image], caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine()
    registry = load_store(engine, small)
    small.rename(small.with_name("aside"))
    for _ in range(3):
        registry.reload()
    assert ask(engine, cifar[0]) == "1" and states(registry) == {"a/1": "ready"}
    (line,) = lines(caplog)
    assert "is it mounted?; loaded bundles are still served" in line and gauge("store_unreachable") == 1
    assert registry.trouble
    small.mkdir()  # an empty mount point
    registry.reload()
    assert ask(engine, cifar[0]) == "1" and gauge("store_unreachable") == 1 and lines(caplog) == []
    small.rmdir()
    small.with_name("aside").rename(small)
    write(hand, small / "a/2")
    registry.reload()
    (line,) = lines(caplog)
    assert "reachable again" in line and gauge("store_unreachable") == 0 and registry.trouble is None
    assert ask(engine, cifar[0]) == "2"


def test_starts_from_its_copies_while_the_store_is_out_of_reach(
    small: Path, tmp_path: Path, cifar: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    fs = fsspec.filesystem("memory")
    fs.put(str(small), "/remote", recursive=True)
    load_store(Engine(), "memory://remote", cache=tmp_path / "cache")
    fs.mv("/remote", "/aside", recursive=True)
    engine = Engine()
    registry = load_store(engine, "memory://remote", cache=tmp_path / "cache")
    assert registry.trouble and ask(engine, cifar[0]) == "1"
    fs.mv("/aside", "/remote", recursive=True)
    registry.reload()
    assert registry.trouble is None and registry.states() == [State("a", "1", "ready")]
    with pytest.raises(CascadeError, match="can't be read"):
        load_store(Engine(), "memory://nowhere", cache=tmp_path / "cache")
    fs.rm("/remote", recursive=True)


def test_another_try_after_a_minute_by_a_clock_that_never_jumps(
    hand: Bundle, small: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine()
    registry = load_store(engine, small)
    write(hand, small / "a/2")
    now, tries, add = 1000.0, 0, engine.add

    def full(bundle: Bundle, warm: bool = False, replaces: Sequence[Identity] = ()) -> None:
        nonlocal tries
        tries += 1
        raise CascadeError("no room")

    monkeypatch.setattr(registries.time, "monotonic", lambda: now)
    monkeypatch.setattr(registries.time, "time", lambda: 0.0)
    monkeypatch.setattr(engine, "add", full)
    registry.reload()
    registry.reload()
    assert tries == 1
    now += registries.RETRY + 1
    registry.reload()
    assert tries == 2 and len(lines(caplog)) == 1, "said once"
    monkeypatch.setattr(engine, "add", add)
    now += registries.RETRY + 1
    registry.reload()
    assert states(registry)["a/2"] == "ready"


@pytest.fixture
def watched(small: Path) -> Iterator[Watched]:
    engine = Engine()
    registry = load_store(engine, small)
    with registry.watching(0.02):
        yield engine, registry


def test_watching(
    watched: tuple[Engine, Registry],
    hand: Bundle,
    small: Path,
    cifar: list[Image.Image],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, registry = watched
    looks, look = [0], registry.store.look

    def failing() -> dict[tuple[str, str], str]:
        looks[0] += 1
        if looks[0] == 1:
            raise ZeroDivisionError  # a defect of ours
        return look()

    monkeypatch.setattr(registry.store, "look", failing)
    write(hand, small / "a/2")
    end = time.monotonic() + 20
    while ask(engine, cifar[0]) != "2":
        assert time.monotonic() < end
    assert looks[0] > 1


def test_watching_ends_with_its_block(small: Path) -> None:
    registry = load_store(Engine(), small)
    for interval in (0, 0.01, 1000):
        with registry.watching(interval):
            assert ("cascade-registry" in [t.name for t in threading.enumerate()]) == (interval > 0)
        assert "cascade-registry" not in [t.name for t in threading.enumerate()]


def test_what_is_remembered_of_the_removed_is_bounded(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registries, "REMEMBERED", 2)
    for i in range(2, 6):
        shutil.copytree(small / "a/1", small / f"a/{i}")
    registry = load_store(Engine(), small)
    for i in range(2, 6):
        shutil.rmtree(small / f"a/{i}")
    registry.reload()
    assert states(registry) == {"a/1": "ready", "a/4": "removed", "a/5": "removed"}
