"""Deferral inside one bundle: accuracy against cost of a small input size, a larger one, and a second pass if unsure.

    python -m benchmarks.deferral                        # every cell of seed 0, one after the other; resumes
    python -m benchmarks.deferral cifar10/both           # only cells with this prefix
    python -m benchmarks.deferral --limit 4000 groceries/frozen     # fewer training images, separate results
    python -m benchmarks.deferral --report               # no training: the table, the plot, the JSON line

A cell is named DATASET/ADAPTER-SIZE/BACKBONE/SEED (one network at one size: the control) or
DATASET/ADAPTER-SMALL-LARGE/BACKBONE/SEED (the small network of that name, with a second pass at the larger size), and
writes a JSON file to ``benchmarks/results/deferral``. ``frozen`` is a head on the backbone; ``both`` is a mask with
scales and shifts trained with labels, or that head if the validation images prefer it; ``masks`` is ``both`` where the
larger size may also have the mask that was trained for it alone. Cost is time, in passes of the small size, with the
serving executor and batches of 16. Missed goals are reported as missed, cells that did not run as not measured.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.accuracy import BACKBONES, IMAGES, TEST_IMAGES
from benchmarks.cells import unmeasured
from benchmarks.deferral_figures import BETWEEN, DATASETS, LARGE, LOSE, SMALL, report
from benchmarks.report import hardware
from cascade.engine.executors.selection import choose
from cascade.engine.weight_cache import WeightCache
from cascade.model import backbone as backbones
from training import deferral, dispatcher
from training.cli import Watch, watching
from training.deferral import Answers, Network
from training.frozen import Candidate, frozen_head, trained_head
from training.recipe import Recipe
from training.run import SPLITS, Run, begin, write_json

RESULTS = Path(__file__).parent / "results" / "deferral"
SHARES = np.linspace(0, 1, 51)  # of images asked again, on the frontier
ROUNDS, BATCH = 15, 16  # of the timing


@dataclass(frozen=True)
class Cell:
    """One measurement; ``large`` is 0 for one network at one size."""

    dataset: str
    adapter: str
    small: int
    large: int
    backbone: str
    seed: int

    @property
    def row(self) -> str:
        return f"{self.adapter}-{self.small}" + (f"-{self.large}" if self.large else "")

    @property
    def name(self) -> str:
        return f"{self.dataset}/{self.row}/{self.backbone}/{self.seed}"

    def recipe(self, limit: int) -> Recipe:
        most = IMAGES[self.dataset]
        return Recipe(
            self.dataset,
            limit=min(limit, most) if limit and most else limit or most,
            test_limit=TEST_IMAGES,
            backbone=self.backbone,
            source=BACKBONES[self.backbone],
            size=self.small,
            labels=True,
            adapt="both",
            seed=self.seed,
        )


def cells(datasets: list[str], backbones: list[str], seeds: int) -> Iterator[Cell]:
    """All cells, the most valuable first; one at the small size is trained with the other two."""
    for seed in range(seeds):
        for backbone in backbones:
            for adapter in ("frozen", "both"):
                for dataset in datasets:
                    for small, large in ((SMALL, 0), (SMALL, LARGE), (BETWEEN[0], 0), (LARGE, 0), (BETWEEN[1], 0)):
                        if (adapter, small) != ("frozen", LARGE):  # that is ``full`` of the pair
                            yield Cell(dataset, adapter, small, large, backbone, seed)
            yield from (Cell(dataset, "masks", SMALL, LARGE, backbone, seed) for dataset in datasets)


def measure(cell: Cell, folder: Path, limit: int, watch: Watch) -> dict[str, Any]:
    """Train what the cell needs, and measure it on the test images."""
    run = opened(cell, folder, limit, watch)
    clock = time.perf_counter()
    network, names = frozen_head(run), ["frozen"]
    if cell.adapter != "frozen":
        dispatcher.train(run)
        mask = trained_head(run, "dispatcher")
        network = mask if mask.validation > network.validation else network
        names.append("dispatcher")
    result: dict[str, Any] = {"accuracy": _percent(network.test), "validation": _percent(network.validation)}
    if cell.large:
        trained = None
        if cell.adapter == "masks":
            trained = opened(replace(cell, small=cell.large, large=0), folder, limit, watch)
            dispatcher.train(trained)
        result = pair(run, network, names, cell.large, trained)
    about = {"dataset": cell.dataset, "row": cell.row, "backbone": cell.backbone, "seed": cell.seed}
    more = {"served": network.name, "steps": run.steps if cell.adapter != "frozen" else 0}
    more |= {"images": len(run.images), "test_images": len(run.held_out)}
    return about | result | more | {"seconds": round(time.perf_counter() - clock)}


def opened(cell: Cell, folder: Path, limit: int, watch: Watch) -> Run:
    """The run of the cell's small size; pairs and single sizes share those of their trainings."""
    name = f"{cell.dataset}-{cell.small}-{cell.backbone}-{cell.seed}" + (f"-{limit}" if limit else "")
    return begin(folder / name, cell.recipe(limit), watch)


def pair(run: Run, small: Candidate, names: list[str], size: int, trained: Run | None = None) -> dict[str, Any]:
    """Both sizes on the test images: each alone, at the threshold of the validation images, and the whole frontier."""
    preprocessing = deferral.preprocessing_of(run, size)
    large = deferral.best(deferral.networks(run, names, preprocessing, trained))
    validation, test = (deferral.answers(Network(run, small), large, split) for split in SPLITS)
    assert validation is not None and test is not None
    threshold = validation.threshold(LOSE)
    accuracy, share = test.at(threshold)
    return {
        "fast": _percent(test.small.mean()),
        "full": _percent(test.large.mean()),
        "accuracy": _percent(accuracy),
        "share": round(share, 4),
        "threshold": round(threshold, 4),
        "larger": "own" if large.run is trained else large.candidate.name,
        "frontier": [[round(float(s), 4), round(100 * a, 3)] for s, a in zip(SHARES, frontier(test), strict=True)],
    }


def _percent(share: float | np.floating[Any]) -> float:
    return round(100 * float(share), 2)


def frontier(both: Answers) -> list[float]:
    """Accuracy in [0, 1] if each of ``SHARES`` of the images, the least certain ones, gets a second pass."""
    order = np.argsort(both.confidence, kind="stable")
    right = both.small[order].astype(float)
    gained = np.concatenate([[0.0], np.cumsum(both.large[order] - right)])
    return [float((right.sum() + gained[round(share * len(order))]) / len(order)) for share in SHARES]


@torch.inference_mode()
def passes(backbone: str, sizes: list[int]) -> dict[str, Any]:
    """Cost of one pass at each size, in passes of the small size: medians of batches that take turns."""
    loaded = backbones.load(backbone, BACKBONES[backbone])
    executor = choose(loaded, WeightCache(2**31), "auto", SMALL)
    inputs = {size: torch.randn(BATCH, 3, size, size) for size in sizes}
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    executor.swap(None)
    for nth in range(ROUNDS + 2):
        for size, x in inputs.items():
            begin = time.perf_counter()
            executor.run(x)
            if nth > 1:
                seconds[size].append(time.perf_counter() - begin)
    base = median(seconds[SMALL])
    relative = {str(size): round(median(own) / base, 3) for size, own in seconds.items()}
    return {"backbone": backbone, "executor": type(executor).__name__, "passes": relative, "hardware": hardware()}


def main(
    only: Annotated[list[str] | None, typer.Argument(help="Beginnings of the names of cells; all by default.")] = None,
    datasets: Annotated[
        list[str] | None, typer.Option("--dataset", help="Repeat it for several; all by default.")
    ] = None,
    backbone: Annotated[str, typer.Option(help=f"One of {', '.join(BACKBONES)}.")] = [*BACKBONES][0],
    seeds: int = 1,
    limit: Annotated[
        int, typer.Option(help="Training images at most; such results are kept in a folder of their own.")
    ] = 0,
    show: Annotated[
        bool, typer.Option("--report", help="Measure nothing: table, plot and figures of what is there.")
    ] = False,
    run: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/deferral"),
) -> None:
    """Train and measure every cell that has no result yet."""
    folder = RESULTS.with_name(f"{RESULTS.name}-{limit}") if limit else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    if not show:
        with watching() as watch:
            for cell, path in unmeasured(cells(datasets or [*DATASETS], [backbone], seeds), folder, only):
                watch.say(cell.name)
                write_json(path, measure(cell, run, limit, watch))
        if not (path := folder / f"passes-{backbone}.json").exists():
            write_json(path, passes(backbone, [SMALL, *BETWEEN, LARGE]))
    report(folder, Path(__file__).parents[1] / "docs" / "deferral.svg")


if __name__ == "__main__":
    typer.run(main)
