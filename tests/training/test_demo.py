"""The demo store: each customer is trained its own way, and what is there is left alone."""

from dataclasses import replace
from pathlib import Path

import pytest

from cascade.bundle.format import read
from cascade.errors import CascadeError
from training import demo, heads
from training.recipe import Recipe


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, cifar_folder: Path) -> Path:
    """A handful of steps on the committed images."""
    monkeypatch.setattr(heads, "PENALTIES", (0.1, 1.0))
    monkeypatch.setattr(demo, "QUICK", {"steps": 3, "batch": 16, "size": 32})
    monkeypatch.setattr(demo, "PICTURES", 20)
    monkeypatch.setattr(demo, "DIGITS_BANK", 30)
    monkeypatch.setattr(demo, "DIGITS_DIM", 16)
    folder = str(cifar_folder)
    monkeypatch.setattr(
        demo, "CUSTOMERS", {name: replace(r, data=folder, limit=0) for name, r in demo.CUSTOMERS.items()}
    )
    return cifar_folder


@pytest.mark.slow
def test_a_fine_tuned_copy_is_imported(small: Path, tmp_path: Path) -> None:
    demo.command(["clothes"], tmp_path / "run", tmp_path / "store", quick=True)
    bundle = read(tmp_path / "store" / "clothes" / "1")
    card = bundle.card
    assert bundle.dispatcher.deltas and bundle.domain is not None and card.preprocessing["size"] == 32
    assert card.classes == sorted(path.name for path in (small / "train").iterdir())
    copy, delta = card.accuracy["rows"].values()
    assert card.accuracy["serves"] == "delta" and 0 <= delta["test"] <= 1 and delta["bytes"] < copy["bytes"] / 10
    assert len(bundle.banks["dispatcher"].names) == len(bundle.thumbnails or ()) == 20
    before = (tmp_path / "store" / "clothes" / "1" / "SHA256SUMS").stat().st_mtime_ns
    demo.command(["clothes"], tmp_path / "run", tmp_path / "store", quick=True)
    assert (tmp_path / "store" / "clothes" / "1" / "SHA256SUMS").stat().st_mtime_ns == before


@pytest.mark.slow
def test_without_labels_it_has_neighbors_and_no_head(small: Path, tmp_path: Path) -> None:
    """And the run is as it was begun: what the bundle keeps is no setting of the training."""
    demo.command(["digits"], tmp_path / "run", tmp_path / "store", quick=True)
    bundle = read(tmp_path / "store" / "digits" / "1")
    assert not bundle.linear and bundle.card.dim == 16 and len(bundle.banks["dispatcher"].names) == 30
    assert bundle.domain is not None and len(bundle.thumbnails or ()) == 30
    assert (Recipe.load(tmp_path / "run" / "digits").bank, Recipe.load(tmp_path / "run" / "digits").dim) == (2000, 256)


def test_unknown_customers_are_named(tmp_path: Path) -> None:
    with pytest.raises(CascadeError, match="no customer shoes: name some of objects, clothes"):
        demo.command(["shoes"], tmp_path)
