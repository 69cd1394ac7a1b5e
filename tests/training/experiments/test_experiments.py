"""Every experiment as a command at the smallest scale: its tables have their rows, and what must hold in them holds."""

from collections.abc import Callable
from typing import Any

import pytest

from training.experiments import (
    compression,
    embeddings,
    equivalence,
    error_bars,
    frozen,
    initialization,
    low_shot,
    main,
    prototypes,
    selective,
    sparsity,
    supervised,
    topk,
)

pytestmark = pytest.mark.slow

Command = Callable[..., dict[str, dict[str, dict[str, Any]]]]
PNG = b"\x89PNG"


def only(tables: dict[str, Any]) -> dict[str, Any]:
    (rows,) = tables.values()
    return dict(rows)


def value(cell: dict[str, Any]) -> float:
    return float(cell["mean"])


def test_main(command: Command) -> None:
    rows = only(command(main))
    controls = {"pixels, 8 x 8", "frozen backbone", "learning-rate zero", "equal-steps dispatcher"}
    assert set(rows) == controls | {"dispatcher", "conditional", "unconditional"}
    assert {"k-NN", "k-NN whitened", "k-NN / eigenvalue", "probe whitened"} <= set(rows["conditional"])
    assert rows["learning-rate zero"]["k-NN"]["mean"] == rows["frozen backbone"]["k-NN"]["mean"]
    assert value(rows["pixels, 8 x 8"]["k-NN"]) > 15, "pixels of ten classes are better than chance"


def test_prototypes_and_runs_that_are_known_again(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prototypes, "COUNTS", (5, 20))
    rows = only(command(prototypes, seeds=2))
    assert set(rows) == {"5", "20", "frozen backbone", "learning rate zero", "pixels, 8 x 8"}
    assert len(rows["5"]["k-NN"]["values"]) == 2 and rows["5"]["k-NN"]["std"] is not None
    runs = sorted((command.out / "runs").iterdir())  # type: ignore[attr-defined]
    again = only(command(prototypes, seeds=2))
    assert again == rows and sorted((command.out / "runs").iterdir()) == runs  # type: ignore[attr-defined]


def test_frozen_masks_what_it_says(command: Command) -> None:
    rows = only(command(frozen, "mask_from=layer3"))
    assert set(rows) == {"none", "BNs", "biases", "frozen backbone", "learning rate zero", "pixels, 8 x 8"}


def test_initialization_notes_what_is_missing(command: Command) -> None:
    rows = only(command(initialization))
    assert {"random, EfficientNet-Lite0", "random, EfficientNet-Lite0, frozen"} <= set(rows)
    here = "AugNet, ResNet-50" in rows
    assert here or "not run: AugNet, ResNet-50: pip install imgsim" in command.notes  # type: ignore[attr-defined]


def test_error_bars(command: Command) -> None:
    rows, controls = command(error_bars, seeds=2).values()
    k_nn = next(cells for row, cells in rows.items() if row.endswith(" k-NN"))
    assert k_nn["all"]["values"] == [k_nn["R1"]["mean"], k_nn["R2"]["mean"]]
    assert "learning rate zero" in controls


def test_embeddings(command: Command) -> None:
    apart, common = command(embeddings).values()
    assert set(apart) == {"pretrained", "adapted", "cascade"}
    for cells in common.values():
        shares = [value(cell) for cell in cells.values()]
        assert shares == sorted(shares) and shares[-1] == pytest.approx(100)
    for name in ("embeddings-small.planes.png", "embeddings-small.clusters.png"):
        assert (command.out / name).read_bytes().startswith(PNG)  # type: ignore[attr-defined]


def test_compression(command: Command) -> None:
    both, delta = command(compression, "mask_from=0", "lr=1", "clusters=2").values()
    assert set(both) == {"plain", *compression.codecs()}
    assert value(both["plain"]["mask bytes / weights' %"]) == pytest.approx(100 / 32, rel=0.01)
    for codec in ("gzip", "lzma", "zstd"):
        assert value(both[codec]["mask reduction %"]) > value(both[codec]["weights reduction %"])
    assert 0 <= value(delta["bits that differ"]["as delta"]) < 0.5


def test_supervised(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(supervised.MASK["small"], "lr", 1.0)  # at the preset's own these few steps flip nothing
    monkeypatch.setitem(supervised.TUNED["small"], "lr", 0.1)
    rows = only(command(supervised, "lr=1"))
    assert len(rows) == 7
    assert 0 < value(rows["supervised mask"]["active %"]) < 100
    head = rows["supervised, learning rate zero: the head alone"]
    assert head["k-NN"]["mean"] == rows["frozen backbone"]["k-NN"]["mean"], "without a rate no feature moves"
    tuned = dict(rows["supervised full fine-tuning"])
    assert tuned.pop("accuracy") and tuned != rows["frozen backbone"]


def test_low_shot(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_shot, "FEWEST", 2)
    monkeypatch.setattr(low_shot, "SHARES", (50, 1))
    rows = only(command(low_shot))
    assert {"head alone", "supervised mask", "supervised full fine-tuning"} <= set(rows)
    assert set(rows["mask, probe whitened"]) == {f"{s} %" for s in low_shot.SHARES}
    assert next((command.out).glob("low_shot-small.*.png")).read_bytes().startswith(PNG)  # type: ignore[attr-defined]


def test_sparsity(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(supervised.SGD["small"], "lr", 1000.0)
    tables = command(sparsity, "lr=1")
    title = "Figures 2 and 3: EfficientNet-Lite0 by stage, % active"  # the name of the preset's own backbone
    assert list(tables[title]) == ["layer2", "layer3", "layer4"]
    whole = next(iter(tables["Table 4: % of the weights that are active"].values()))
    assert 0 < value(next(iter(whole.values()))) < 100


def test_topk(command: Command) -> None:
    rows = only(command(topk, "lr=1"))
    found = value(rows["threshold"]["active %"])
    assert value(rows["top k, found share"]["active %"]) == pytest.approx(found, abs=0.1)
    assert value(rows["top k, progressive to the found share"]["active %"]) == pytest.approx(found, abs=0.1)
    assert value(rows["top k, 50 %"]["active %"]) == pytest.approx(50, abs=0.1)


def test_selective(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(selective.UP_TO, "small", ("layer4",))
    rows = only(command(selective))
    million = {row: value(cells["million masks"]) for row, cells in rows.items() if "million masks" in cells}
    assert million["random, as many as before layer4"] == pytest.approx(million["before layer4"], rel=0.01)
    assert million["random 50 %"] == pytest.approx(million["all"] / 2, rel=0.01) == million["largest 50 %"]


def test_equivalence(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(supervised.SGD, "small", {"labels": True, "head_lr": 0.15, "head_steps": 0})
    rows = only(command(equivalence, "optimizer=rms-sgd", "lr=0.3"))
    differ = {title: value(cells["% of bits that differ"]) for title, cells in rows.items()}
    standard, shifted, doubled, *others = differ
    assert differ[doubled] == 0, "a factor of two changes no rounding"
    assert differ[shifted] < 0.1 < min(differ[title] for title in others)
    assert value(rows[doubled]["largest difference of losses"]) == 0
    assert differ[standard] == 0
