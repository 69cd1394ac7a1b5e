"""Which version of a bundle answers: the latest or the pinned one, while others come and go."""

import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from cascade import Engine, ItemError, Options, Prediction
from cascade.bundle.format import Bundle, write
from cascade.engine.journal import Journal
from cascade.engine.pins import pinned
from cascade.engine.stores import load_store
from cascade.errors import CascadeError
from tests.helpers.registry import ask, states


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
