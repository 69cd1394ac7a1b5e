"""The benchmark of deferral: its figures from results that are made up, and one cell on a small network."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import deferral, deferral_figures
from training.cli import Watch
from training.deferral import Answers
from training.run import Run

COSTS = {"net": {"64": 1.0, "88": 2.0, "112": 3.0, "128": 4.0}}


def pair(seed: int, best: float = 84.0) -> dict[str, Any]:
    """From 80 % without asking again, two points a tenth, up to ``best``."""
    points = [[round(s, 2), min(best, 80 + 20 * s)] for s in np.linspace(0, 1, 51).tolist()]
    about = {"dataset": "d", "row": "both-64-128", "backbone": "net", "seed": seed}
    return about | {"fast": 80.0, "full": 84.0, "accuracy": 83.8, "share": 0.2, "frontier": points}


def test_figures() -> None:
    results: deferral_figures.Results = {("d", "both-64-128", "net", seed): pair(seed) for seed in (0, 1)}
    results |= {("d", "both-88", "net", seed): {"accuracy": 82.0 + seed} for seed in (0, 1)}
    values = deferral_figures.figures(results, COSTS, "both")
    assert values["deferral_cost"] == pytest.approx([(1 + 0.2 * 4) / 4] * 2), "83.7 % are reached with a fifth"
    assert values["deferral_cost_validated"] == pytest.approx([0.45] * 2)
    assert values["deferral_lost"] == pytest.approx([0.2] * 2)
    assert values["deferral_over_single"] == pytest.approx([2.0, 1.0]), "at two passes a quarter is asked again"
    found = deferral_figures.summary(results, COSTS, "both")
    assert found["deferral_cost"]["met"] is True
    assert found["deferral_over_single"]["met"] is True and found["deferral_over_single"]["value"] == 1.5
    wide = results | {("d", "both-88", "net", 0): {"accuracy": 86.0}}
    assert deferral_figures.summary(wide, COSTS, "both")["deferral_over_single"]["met"] is False
    assert deferral_figures.summary(results, COSTS, "frozen")["deferral_cost"]["value"] == "not measured"
    own = {(d, row.replace("both-64", "masks-64"), *rest): r for (d, row, *rest), r in results.items()}
    assert deferral_figures.figures(own, COSTS, "masks") == values, "the control of one size is the same"  # type: ignore[arg-type]


def test_one_value_decides_nothing_about_two_deviations() -> None:
    results: deferral_figures.Results = {
        ("d", "both-64-128", "net", 0): pair(0),
        ("d", "both-88", "net", 0): {"accuracy": 8.0},
    }
    assert deferral_figures.summary(results, COSTS, "both")["deferral_over_single"]["met"] is None


def test_the_frontier_asks_the_least_certain_first() -> None:
    confidence = np.arange(100, dtype=np.float32) / 100
    both = Answers(confidence, confidence >= 0.5, np.ones(100, bool))
    found = deferral.frontier(both)
    assert found[0] == 0.5 and found[25] == 1.0 and found[-1] == 1.0
    assert found[10] == pytest.approx(0.7)


@pytest.mark.slow
def test_a_cell(cifar_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(deferral.BACKBONES, "test_efficientnet", "random:0")
    monkeypatch.setitem(deferral.IMAGES, str(cifar_folder), 0)
    monkeypatch.setattr(deferral, "BATCH", 2)
    monkeypatch.setattr(Run, "steps", 2)
    for adapter, large in (("frozen", 0), ("masks", 64), ("frozen", 64)):
        cell = deferral.Cell(str(cifar_folder), adapter, 32, large, "test_efficientnet", 0)
        result = deferral.measure(cell, tmp_path / "runs", 0, Watch(None))
        assert json.loads(json.dumps(result)) == result and 0 <= result["accuracy"] <= 100
    assert len(result["frontier"]) == 51
    assert result["frontier"][0] == [0.0, pytest.approx(result["fast"], abs=0.01)]
    assert result["frontier"][-1] == [1.0, pytest.approx(result["full"], abs=0.01)]
