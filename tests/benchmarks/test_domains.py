"""The benchmark of dispatch: every method on two small domains, and one mask that forgets."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import domain_controls, domain_sets, domains
from cascade import Engine
from tests.conftest import sheet
from tests.helpers.datasets import CIFAR10
from training.cli import Watch
from training.run import resume

pytestmark = pytest.mark.slow
CLASSES = {"animals": ["bird", "cat"], "vehicles": ["ship", "truck"]}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Real photos in the layout of ``export_domain``."""
    for name, classes in CLASSES.items():
        for label in classes:
            rows = np.flatnonzero(np.array(CIFAR10["labels"]) == CIFAR10["names"].index(label))
            for n, row in enumerate(rows[:26]):
                split = "train" if n < 20 else "test"
                for path in (tmp_path / name / split / label, tmp_path / "joint" / split / f"{name} {label}"):
                    path.mkdir(parents=True, exist_ok=True)
                    sheet("cifar10")[row].save(path / f"{n}.png")
    for name, value in {"BACKBONE": "test_efficientnet", "SOURCE": "random:0", "STAGE": "blocks.3", "SIZE": 32}.items():
        monkeypatch.setattr(domain_sets, name, value)
    monkeypatch.setattr(domains, "DOMAINS", {name: ("cifar10", classes) for name, classes in CLASSES.items()})
    monkeypatch.setattr(domain_controls, "RANDOM", 50)
    return tmp_path


def test_every_method(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, engine, sets = domains.measure(folder, 4, 0, Watch(None))
    assert isinstance(engine, Engine) and {name: len(own.images) for name, own in sets.items()} == {
        "animals": 12,
        "vehicles": 12,
    }
    assert len(found) == 10 and all([*shares] == [*CLASSES] for shares in found.values())
    assert all(0 <= share <= 1 for shares in found.values() for share in shares.values())
    steps: dict[str, Any] = {}
    for run in sorted((folder / "runs").iterdir()):
        for curve in run.glob("*/curve.jsonl"):
            steps[f"{run.name}/{curve.parent.name}"] = json.loads(curve.read_text().splitlines()[-1])["step"] + 1
    assert steps == {
        "animals/dispatcher": 4,
        "vehicles/dispatcher": 4,
        "joint/dispatcher": 8,
        "joint-sequential/sequential-0": 4,
        "joint-sequential/sequential-1": 4,
        "animals/fine-tuned": 4,
        "vehicles/fine-tuned": 4,
    }, "equal total steps"
    reported: list[Any] = []
    monkeypatch.setattr(domains, "report", lambda *facts, **_: reported.append(facts))
    domains.main(folder, 4, converged=False, seeds=1)
    ((name, figures, table),) = reported
    assert name == "domains" and table.row_count == 10
    assert figures["forgotten"].value == 0 and figures["named_passes"].value > 0
    gap = 100 * np.mean([found[domains.AUTO][n] - found[domains.IN_TURN][n] for n in CLASSES])
    assert figures["auto_over_sequential"].value == pytest.approx(gap), "everything was stored"


def test_one_mask_in_turn_goes_on_from_the_last_domain(folder: Path) -> None:
    run = domain_sets.run_of("joint", folder, 40, 0, Watch(None), "-sequential")
    shares = domain_controls.sequential(run, {"animals": 20, "vehicles": 20})
    first, last = (resume(run.folder, Watch(None)).trained(f"sequential-{n}") for n in (0, 1))
    classes = {name: [i for i, c in enumerate(run.images.classes) if c.startswith(name)] for name in CLASSES}
    grown = (last["objective.bias"] - first["objective.bias"]).numpy()
    assert grown[classes["vehicles"]].min() > grown[classes["animals"]].max(), "only the new classes are learned"
    assert shares["vehicles"] > 0.3
    other = domain_sets.run_of("joint", folder, 40, 0, Watch(None), "-other")
    assert domain_controls.sequential(other, {"animals": 20}).keys() == {"animals"}
    np.testing.assert_array_equal(other.trained("sequential-0")["objective.bias"], first["objective.bias"])
