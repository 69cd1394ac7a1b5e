"""What can be loaded is, and what can't is refused by name."""

import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from cascade import Engine, Options, Prediction
from cascade.bundle.format import Bundle, write
from cascade.engine import registry as registries
from cascade.engine.registry import Registry, State
from cascade.engine.stores import load_store
from cascade.errors import CascadeError
from tests.helpers.registry import ask, flip, gauge, lines, states


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
