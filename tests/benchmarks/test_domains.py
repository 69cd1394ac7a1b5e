"""The benchmark of dispatch: every method on two small domains that arrive one by one, and one mask that forgets."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import domain_controls, domain_figures, domain_sets, domains
from benchmarks.domain_figures import (
    AUTO,
    BETWEEN,
    IN_TURN,
    JOINTLY,
    NAMED,
    ROUTED,
    ROUTED_TOP2,
    SEARCH,
    SEARCH_RESNET50,
    TOP2,
    UNKNOWN,
    Measured,
)
from benchmarks.domain_sets import JOINT, Setting
from tests.conftest import sheet
from tests.helpers.datasets import CIFAR10
from training.cli import Watch
from training.run import resume

CLASSES = {"animals": ["bird", "cat"], "vehicles": ["ship", "truck"]}


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    """Real photos in the layout of ``export_domain``."""
    for name, classes in CLASSES.items():
        for label in classes:
            rows = np.flatnonzero(np.array(CIFAR10["labels"]) == CIFAR10["names"].index(label))
            for n, row in enumerate(rows[:26]):
                split = "train" if n < 20 else "test"
                for path in (tmp_path / name / split / label, tmp_path / JOINT / split / f"{name} {label}"):
                    path.mkdir(parents=True, exist_ok=True)
                    sheet("cifar10")[row].save(path / f"{n}.png")
    monkeypatch.setattr(domain_sets, "BACKBONES", {"test_efficientnet": "random:0"})
    monkeypatch.setattr(domain_sets, "SIZE", 32)
    monkeypatch.setattr(domains, "SIZE", 32)
    monkeypatch.setattr(domain_controls, "RANDOM", 50)
    return Setting(tmp_path, tuple(CLASSES), Watch(None), 4, 0, "test_efficientnet", "blocks.3")


@pytest.mark.slow
def test_every_method(setting: Setting) -> None:
    found, engine, controls = domains.measure(setting)
    assert all([*found.shares(way)] == [*CLASSES] for way in (*found.growing, *found.final))
    assert all(len(arrivals) == 2 and [*arrivals[0]] == ["animals"] for arrivals in found.growing.values())
    assert all(0 <= share <= 1 for way in (*found.growing, *found.final) for share in found.shares(way).values())
    assert all(len(sizes) == 2 and min(sizes) > 0 for sizes in found.bytes.values())
    assert all(len(taken) == 2 and min(taken) > 0 for taken in found.seconds.values())
    steps: dict[str, Any] = {}
    for run in sorted((setting.root / "runs").iterdir()):
        for curve in run.glob("*/curve.jsonl"):
            steps[f"{run.name}/{curve.parent.name}"] = json.loads(curve.read_text().splitlines()[-1])["step"] + 1
    assert steps == {
        "animals-0/dispatcher": 4,
        "vehicles-0/dispatcher": 4,
        "joint-0/dispatcher": 8,
        "joint-sequential-0/sequential-0": 4,
        "joint-sequential-0/sequential-1": 4,
        "animals-0/fine-tuned": 4,
        "vehicles-0/fine-tuned": 4,
    }, "equal total steps"
    sets = setting.held_out()
    assert [len(own.images) for own in sets.values()] == [12, 12]
    assert domains.forgotten(engine, sets, setting.train("animals")) == 0
    passes = domains.costs(engine, controls, sets)
    assert {SEARCH, AUTO, TOP2, NAMED} < passes.keys() and min(map(min, passes.values())) > 0
    again, *_ = domains.measure(setting)
    assert (again.growing, again.final, again.bytes) == (found.growing, found.final, found.bytes), "all was stored"


def test_dispatch_in_passes_of_another_backbone() -> None:
    (passes,) = domains.costs_of_search("test_resnet", 32, rounds=2).values()
    assert len(passes) == 2 and min(passes) > 0


@pytest.mark.slow
def test_one_mask_in_turn_goes_on_from_the_last_domain(setting: Setting) -> None:
    run = setting.run(JOINT, "-sequential")
    alone, both = domain_controls.sequential(run, {"animals": 20, "vehicles": 20})
    first, last = (resume(run.folder, Watch(None)).trained(f"sequential-{n}") for n in (0, 1))
    classes = {name: [i for i, c in enumerate(run.images.classes) if c.startswith(name)] for name in CLASSES}
    grown = (last["objective.bias"] - first["objective.bias"]).numpy()
    assert grown[classes["vehicles"]].min() > grown[classes["animals"]].max(), "only the new classes are learned"
    assert [*alone] == ["animals"] and both["vehicles"] > 0.3
    other = setting.run(JOINT, "-other")
    assert domain_controls.sequential(other, {"animals": 20})[0].keys() == {"animals"}
    np.testing.assert_array_equal(other.trained("sequential-0")["objective.bias"], first["objective.bias"])


def test_ridge_on_random_features_knows_only_the_classes_that_it_saw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(domain_controls, "RANDOM", 200)
    generator = torch.Generator().manual_seed(0)
    y = torch.tensor([3, 7]).repeat(50)
    x = torch.randn(100, 8, generator=generator) + 3 * (y == 7)[:, None]
    guesses = domain_controls._ridge(x, y, x, 0)
    assert set(guesses.tolist()) == {3, 7} and (guesses == y).float().mean() > 0.95


def test_tables_figures_and_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def seed(auto: float) -> Measured:
        growing = {
            way: domains.growing({"a": 0.5, "b": auto if way == AUTO else 0.7})
            for way in domain_figures.METHODS
            if way not in (JOINTLY, TOP2)
        }
        routing = (ROUTED, ROUTED_TOP2, BETWEEN, UNKNOWN)
        final = {way: {"a": 0.9, "b": 1.0} for way in (JOINTLY, TOP2, *routing)}
        return Measured(growing, final, {AUTO: [1000, 3000]}, {AUTO: [2.0, 4.0]})

    reported: list[Any] = []
    monkeypatch.setattr(domain_figures, "report", lambda *facts, **more: reported.append((facts, more)))
    monkeypatch.setattr(domain_figures, "DOCS", tmp_path)
    passes = {AUTO: [1.5], TOP2: [1.6], NAMED: [1.4], SEARCH: [0.01], SEARCH_RESNET50: [0.001]}
    domain_figures.show("domains", "two seeds", [seed(0.8), seed(0.9)], passes, "<= 1.1", 0, "none")
    (((name, figures, *tables), more),) = reported
    assert name == "domains" and [table.row_count for table in tables] == [12, 6, 8]
    assert figures["auto_over_sequential"].value == pytest.approx(7.5), "half of 10 and of 20 points"
    assert figures["auto_over_sequential_sd"].value == pytest.approx(7.5 / 3.5355, rel=1e-3)
    assert figures["auto_passes"].met is False and figures["bytes_a_domain"].value == 2000
    assert more["details"]["seeds"][1]["growing"][IN_TURN] == [{"a": 0.5}, {"a": 0.5, "b": 0.7}]
    assert (tmp_path / "domains.svg").read_text().startswith("<?xml")
