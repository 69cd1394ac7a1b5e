"""The model store: what can be loaded is, what can't is refused by name."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from cascade import Engine, Options, Prediction, metrics
from cascade.bundle import Bundle, write
from cascade.errors import CascadeError
from cascade.registry import Refusal, discover, load_store

from .handmade import handmade


@pytest.fixture(scope="module")
def hand(cifar: list[Image.Image]) -> Bundle:
    return handmade(cifar[:40], experts=0)


@pytest.fixture
def store(hand: Bundle, tmp_path: Path) -> Path:
    """Three good bundles; one with a flipped byte, one half copied, one foreign, one without weights, one hidden."""
    root = tmp_path / "store"
    for path in ("a/1", "a/2", "b/1", "corrupt/1", "half/1"):
        write(hand, root / path)
    masks = root / "corrupt/1/masks.safetensors"
    raw = bytearray(masks.read_bytes())
    raw[-3] ^= 16
    masks.write_bytes(raw)
    (root / "half/1/fusion.safetensors").unlink()
    back = hand.card.backbone.model_copy(update={"fingerprint": "1" * 64})
    write(replace(hand, card=hand.card.model_copy(update={"backbone": back})), root / "foreign/1")
    elsewhere = hand.card.backbone.model_copy(update={"fingerprint": "2" * 64, "source": "file:gone.safetensors"})
    write(replace(hand, card=hand.card.model_copy(update={"backbone": elsewhere})), root / "lost/1")
    shutil.copytree(root / "a/1", root / "a/.3.99.tmp")
    shutil.copytree(root / "a", root / ".trash")
    (root / "notes.txt").write_text("mine")
    (root / "empty/1").mkdir(parents=True)
    return root


def test_discovers_what_has_a_card(store: Path) -> None:
    found = [str(p.relative_to(store)) for p in discover(store)]
    assert found == ["a/1", "a/2", "b/1", "corrupt/1", "foreign/1", "half/1", "lost/1"]


def test_loads_the_good_and_refuses_the_bad_by_name(store: Path, cifar: list[Image.Image]) -> None:
    engine = Engine()
    refused = load_store(engine, store)
    assert engine.bundles == [("a", "1"), ("a", "2"), ("b", "1")]
    assert all(isinstance(r, Refusal) for r in refused)
    reasons = {str(r.path.relative_to(store)): r.reason for r in refused}
    assert list(reasons) == ["corrupt/1", "foreign/1", "half/1", "lost/1"]
    assert "masks.safetensors: its checksum is not the one in SHA256SUMS" in reasons["corrupt/1"]
    assert "bundle foreign/1 was trained on test_resnet with fingerprint 111111111111" in reasons["foreign/1"]
    assert "(fusion.safetensors); copy the bundle again, whole" in reasons["half/1"]
    assert "no weights at gone.safetensors; give the checkpoint with --weights FILE" in reasons["lost/1"]
    assert not [reason for reason in reasons.values() if "\n" in reason]
    assert all(isinstance(a, Prediction) for a in engine.predict(cifar[:2], [Options(bundle="a"), Options(bundle="b")]))
    assert b'cascade_bundle_refused{bundle="corrupt"} 1.0' in metrics.scrape()


def test_refusals_are_logged_by_name(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_store(Engine(), store)
    lines = [record.getMessage() for record in caplog.records if record.name == "cascade.registry"]
    assert [line.split(":")[0] for line in lines] == [
        f"refused bundle {name}/1" for name in ("corrupt", "foreign", "half", "lost")
    ]


def test_an_empty_store(tmp_path: Path) -> None:
    for store in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CascadeError, match=r"no bundle could be loaded .*: put bundles at .*/<name>/<version>/"):
            load_store(Engine(), store)


def test_a_store_of_nothing_but_bad_ones(store: Path) -> None:
    for good in ("a", "b"):
        shutil.rmtree(store / good)
    with pytest.raises(CascadeError, match="no bundle could be loaded from .*masks.safetensors: its checksum") as error:
        load_store(Engine(), store)
    assert "\n" not in str(error.value)
