"""Figures of the benchmark of accuracy, its mixed throughput, and the adapters whose throughput it measures."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import accuracy_figures, synthetic
from benchmarks.accuracy import Cell, cells
from benchmarks.accuracy_figures import GOALS, figures, mixed_name
from benchmarks.accuracy_throughput import KINDS, adapted
from cascade.bundle.format import check
from cascade.model.masks import density


def result_of(row: str, accuracy: float) -> dict[tuple[str, str, str, int], dict[str, Any]]:
    return {("cifar10", row, "tf_efficientnet_lite0", 0): {"accuracy": accuracy, "bytes": 1}}


def test_what_is_missing_is_not_measured() -> None:
    found = figures(result_of("unlabeled-distilled", 80.0) | result_of("unlabeled-lightly", 77.5))
    assert found["unlabeled_over_lightly"] == 2.5 and found.keys() == GOALS.keys()
    assert {value for name, value in found.items() if name != "unlabeled_over_lightly"} == {None}


def test_a_data_set_counts_once_however_many_seeds_it_has() -> None:
    gains = {("digits", 0): 2.0, ("groceries", 0): 7.0, ("groceries", 1): 9.0}
    results = {
        (dataset, row, "net", seed): {"accuracy": 60.0 + gain, "bytes": 1}
        for (dataset, seed), most in gains.items()
        for row, gain in (("frozen", 0.0), ("both", most))
    }
    assert figures(results)["mask_over_head"] == 5.0


def test_cells_are_those_of_every_row_and_lora_comes_last() -> None:
    rows = [cell.row for cell in cells(["digits"], ["tf_efficientnet_lite0"], 1)]
    assert rows[0] == "frozen" and rows[-1] == "lora" and len(rows) == len(set(rows)) == 11
    assert Cell("cifar10", "both", "tf_efficientnet_lite0", 0).recipe(400).limit == 400


def test_mixed_throughput_is_shown_once_it_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy_figures, "RESULTS", tmp_path / "accuracy")
    assert accuracy_figures.mixed_rate("both", "net") == ""
    rates = {"both": {"value": 1234.4}, "delta": {"value": 900.0}}
    (tmp_path / f"{mixed_name('net')}.json").write_text(json.dumps({"figures": rates}))
    shown = [accuracy_figures.mixed_rate(row, "net") for row in ("both", "delta-distilled", "lora")]
    assert shown == ["1,234", "900", ""]


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_adapters_are_what_each_row_ships(kind: str) -> None:
    backbone = synthetic.load("test_efficientnet")
    mask = adapted(backbone, kind, 0)
    check(synthetic.bundle_of(backbone, "one", [mask], size=32), backbone)
    assert bool(mask.channels) == (kind in ("channels", "both", "delta")) and bool(mask.deltas) == (kind == "delta")
    assert (density(backbone, mask) < 1) == (kind in ("mask", "both"))
    assert torch.equal(mask.bits, adapted(backbone, kind, 0).bits)
