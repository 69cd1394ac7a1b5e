"""New classes without training: ``cascade heads add`` against a refitted head and a retrained mask.

    python -m benchmarks.new_classes             # both data sets; resumes in runs/new-classes

A bundle is trained on all classes of a data set except the last two, which are then added. Each row classifies the same
held-out images of all classes: the closed form; a logistic regression on the features of the same mask (which needs the
images of all classes); a mask trained on all classes. Data sets come from ``python -m benchmarks.datasets digits
groceries``.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.table import Table

from benchmarks.accuracy import BACKBONES, SIZE
from benchmarks.report import Figure, report, single
from cascade import Engine, Options, Prediction
from cascade.bundle.format import read
from cascade.engine.executors.plain import PlainExecutor
from cascade.engine.weight_cache import WeightCache
from cascade.model import backbone as backbones
from training import embed, heads, new_classes, pipeline
from training.cli import Watch, watching
from training.data import dataset
from training.data.dataset import Images
from training.recipe import Recipe
from training.run import begin

BACKBONE, SOURCE = next(iter(BACKBONES.items()))
DATASETS = ("digits", "groceries")
NEW = 2  # classes that are added


def write(images: Images, rows: np.ndarray, folder: Path) -> Path:
    """Write images as class folders of PNG files."""
    assert images.labels is not None
    for row in rows:
        path = folder / images.classes[images.labels[row]].replace("/", " or ")
        path.mkdir(parents=True, exist_ok=True)
        images.open(row).save(path / f"{row:06d}.png")
    return folder


def trained(source: Path, name: str, folder: Path, watch: Watch) -> Path:
    """The bundle of ``cascade train --labels --extensible``; a finished one is kept."""
    out = folder / "store" / name / "1"
    if not out.exists():
        watch.say(name)
        recipe = Recipe(str(source), backbone=BACKBONE, source=SOURCE, size=SIZE, labels=True, bank=0)
        pipeline.train(begin(folder / "runs" / name, recipe, watch), out, extensible=True)
    return out


def right(bundle: Path, images: Images, rows: Sequence[int] | np.ndarray) -> float:
    """Accuracy of a bundle on held-out images."""
    assert images.labels is not None
    engine = Engine()
    engine.add(read(bundle))
    answers = engine.predict([images.open(i) for i in rows], Options(labels=1, neighbors=0))
    wanted = [images.classes[images.labels[i]].replace("/", " or ") for i in rows]
    found = [a.labels[0].name if isinstance(a, Prediction) else None for a in answers]
    return float(np.mean([name == label for name, label in zip(found, wanted, strict=True)]))


def refitted(bundle: Path, train: Images, test: Images) -> float:
    """Accuracy of a logistic regression on the bundle's features of all classes."""
    found = read(bundle)
    backbone = backbones.load(found.card.backbone.name, found.card.backbone.source)
    executor = PlainExecutor(backbone, WeightCache(2**34))

    def features(images: Images) -> np.ndarray:
        pixels = embed.cropped(map(images.open, range(len(images))), found.preprocessing)
        return embed.blocks(executor, [found.dispatcher], embed.normalized(pixels, found.preprocessing))[0]

    assert train.labels is not None and test.labels is not None
    fitted = heads.fit(features(train), train.labels, len(train.classes))
    return heads.accuracy(fitted.head, features(test), test.labels)


def measure(name: str, folder: Path, watch: Watch) -> tuple[Table, dict[str, Figure]]:
    """All rows of one data set."""
    train, test = dataset.load(name, "train"), dataset.load(name, "test")
    assert train.labels is not None and test.labels is not None
    first_new = len(train.classes) - NEW
    is_new = train.labels >= first_new
    parts = {"old": np.flatnonzero(~is_new), "new": np.flatnonzero(is_new), "all": np.arange(len(train))}
    folders = {
        part: folder / name / part if (folder / name / part).exists() else write(train, rows, folder / name / part)
        for part, rows in parts.items()
    }
    old = trained(folders["old"], f"{name}-old", folder, watch)
    whole = trained(folders["all"], f"{name}-all", folder, watch)
    grown = folder / "store" / f"{name}-old" / "2"
    begun = time.perf_counter()
    if not grown.exists():
        new_classes.add(old, folders["new"], grown)
    seconds = time.perf_counter() - begun
    olds, news = np.flatnonzero(test.labels < first_new), np.flatnonzero(test.labels >= first_new)
    everything = np.arange(len(test))
    table = Table(
        "bundle", "old classes", "new classes", "all", title=f"{name}: accuracy in %, {len(test)} test images"
    )

    def row(title: str, bundle: Path) -> float:
        shares = [100 * right(bundle, test, rows) for rows in (olds, news, everything)]
        table.add_row(title, *(f"{share:.1f}" for share in shares))
        return shares[2]

    row("before, old classes only", old)
    closed = row("heads add", grown)
    trained_again = row("mask trained on all classes", whole)
    logistic = 100 * refitted(old, train, test)
    table.add_row("logistic regression on the same mask's features", "", "", f"{logistic:.1f}")
    return table, {
        f"{name}_over_refitted": single(closed - logistic),
        f"{name}_over_trained": single(closed - trained_again),
        f"{name}_seconds": single(seconds),
    }


def main(folder: Annotated[Path, typer.Option("--run", help="Folder of the runs.")] = Path("runs/new-classes")) -> None:
    """Add two classes to a bundle of each data set."""
    torch.manual_seed(0)
    with watching() as watch:
        found = [measure(name, folder, watch) for name in DATASETS]
    figures = {name: value for _, own in found for name, value in own.items()}
    report("new_classes", figures, *(table for table, _ in found), executor=None)


if __name__ == "__main__":
    typer.run(main)
