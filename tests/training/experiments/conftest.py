"""One folder of runs for all experiments: runs with equal recipes are trained once."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from training.experiments import lab

# A real network (random weights), real images, tiny steps.
TINY = {
    "backbone": "test_resnet",
    "source": "random:0",
    "size": 32,
    "mask_from": "layer2",
    "draws": 0,
    "local_crops": 0,
    "batch": 32,
    "steps": 4,
    "expert_steps": 2,
    "prototypes": 20,
    "clusters": 2,
    "router": "centroid",
    "dim": 16,
    "limit": 200,
    "neighbors": 10,
}

Results = dict[str, dict[str, dict[str, Any]]]  # table -> row -> column -> mean, std and values


@pytest.fixture(scope="session")
def command(tmp_path_factory: pytest.TempPathFactory, cifar_folder: Path) -> Callable[..., Results]:
    """Run an experiment's command; gives the rows of each table that it left as JSON, by title."""
    out = tmp_path_factory.mktemp("experiments")

    def run(module: ModuleType, *changes: str, seeds: int = 1) -> Results:
        arguments = ["--out", str(out), "--data", str(cifar_folder), "--seeds", str(seeds)]
        for change in (*(f"{k}={v}" for k, v in TINY.items()), *changes):
            arguments += ["--set", change]
        with pytest.raises(SystemExit) as done:
            lab.main(module.experiment, module.SMALL, module.PAPER, arguments)
        assert done.value.code == 0
        name = module.__name__.rpartition(".")[2]
        assert (out / f"{name}-small.md").read_text().startswith("**")
        left = json.loads((out / f"{name}-small.json").read_text())
        assert left["experiment"] == name and left["peak MB"] > 0 and str(out) not in json.dumps(left)
        run.notes = left["notes"]  # type: ignore[attr-defined]
        run.out = out  # type: ignore[attr-defined]
        return {
            table["title"]: {
                row: {column.removeprefix(f"{cifar_folder.name} "): cell for column, cell in cells.items()}
                for row, cells in table["rows"].items()
            }
            for table in left["tables"]
        }

    return run
