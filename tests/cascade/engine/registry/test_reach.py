"""A store that is out of reach, and one that is watched for changes."""

import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import fsspec
import pytest
from PIL import Image

from cascade import Engine
from cascade.bundle.format import Bundle, write
from cascade.bundle.store import Identity
from cascade.engine import registry as registries
from cascade.engine.registry import Registry, State
from cascade.engine.stores import load_store
from cascade.errors import CascadeError
from tests.helpers.registry import ask, gauge, lines, states

Watched = tuple[Engine, Registry]


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
