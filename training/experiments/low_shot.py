"""Figure 3 of the main paper: 10 to 0.25 % of the labels, with masks trained without labels and with these few.

python -m training.experiments.low_shot
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training import dispatcher, embed, evaluate, finetune, fusion
from training.data import dataset
from training.experiments import report
from training.experiments.lab import Lab, Pair, labels, main, name_of, pair
from training.experiments.report import Table
from training.experiments.supervised import HEAD_FIRST, MASK, TUNED, accuracy
from training.run import Run

SMALL: dict[str, Any] = {}
PAPER = {"data": ("cifar100",), "epochs": 150}
SHARES = (10, 4, 2, 1, 0.5, 0.25)  # % of the labels
FEWEST = 80  # fewest steps of a training with labels; otherwise it has as many epochs as with all labels
# Small batches and high rates for few steps.
FEW: dict[str, dict[str, Any]] = {"small": {"batch": 32, "lr": 0.026, "head_lr": 0.02}, "paper": {}}


def experiment(lab: Lab) -> list[Table]:
    """k-NN and probe on few labels; whitening is fitted on all images, because it needs no labels."""
    tables = []
    for name in lab.sets():
        short = name_of(name)
        table = Table(f"Main figure 3, {short}: accuracy in % by share of the labels")
        for seed in lab.seeds:
            run = lab.trained(name, seed)
            for method, mask in (("frozen backbone", None), ("mask", run.dispatcher)):
                features = pair(run, mask)
                for way, both in (("", features), (" whitened", whitened(run, features))):
                    for kind, cells in few(run, both, seed).items():
                        table.add(f"{method}, {kind}{way}", cells)
            for method, cells in by_labels(lab, name, seed).items():
                table.add(method, cells)
        tables.append(table)
        curves = {row: (SHARES, [table.mean(row, f"{s} %") for s in SHARES]) for row in table.cells}
        report.draw(lab.path(f"low_shot.{short}.png"), {short: curves}, "% of the labels", "accuracy in %", "o-")
    return tables


def few(run: Run, features: Pair, seed: int) -> dict[str, dict[str, float]]:
    """Accuracies of k-NN and probe, by share."""
    known, truth = labels(run)
    classes = len(np.unique(known.numpy()))
    out: dict[str, dict[str, float]] = {"k-NN": {}, "probe": {}}
    for share in SHARES:
        rows = torch.from_numpy(labeled(run, share, seed))
        bank, queries = torch.from_numpy(features[0])[rows], torch.from_numpy(features[1])
        k = min(run.recipe.neighbors, max(1, len(rows) // classes))  # more would be of other classes
        out["k-NN"][f"{share} %"] = 100 * evaluate.knn(bank, queries, known[rows], truth, k)
        out["probe"][f"{share} %"] = 100 * evaluate.probe(bank, queries, known[rows], truth)
    return out


def labeled(run: Run, share: float, seed: int) -> np.ndarray:
    """The training images whose labels are known, int64: ``share`` % of all, at least one of each class."""
    known = labels(run)[0].numpy()
    return dataset.evenly(known, seed)[: max(len(np.unique(known)), round(share / 100 * len(known)))]


def by_labels(lab: Lab, name: str, seed: int) -> dict[str, dict[str, float]]:
    """Accuracies with few labels: the head only, with a mask, and with full fine-tuning."""
    recipe = MASK[lab.preset] | FEW[lab.preset]
    run = lab.run(name, seed, **recipe)
    tuned = lab.run(name, seed, **(recipe | TUNED[lab.preset]))
    out: dict[str, dict[str, float]] = {}
    for share in SHARES:
        rows = labeled(run, share, seed)
        steps = max(FEWEST, round(run.recipe.steps * len(rows) / len(run.images)))
        some: dict[str, Any] = {"rows": rows, "steps": steps}
        own, head = f"few-{len(rows)}", f"few-{len(rows)}-head"
        dispatcher.train(run, head, lr=0.0, **some)
        some["head"] = run.folder / head if HEAD_FIRST[lab.preset] else None
        dispatcher.train(run, own, **some)
        model = finetune.train(tuned, own, **some)
        for method, folder in (("head alone", head), ("supervised mask", own)):
            features = embed.blocks(run.executor, [run.mask(folder, run.mask_from)], _inputs(run))[0]
            out.setdefault(method, {})[f"{share} %"] = accuracy(run, folder, features)
        features = finetune.features(model, _inputs(run))
        out.setdefault("supervised full fine-tuning", {})[f"{share} %"] = accuracy(tuned, own, features)
    return out


def _inputs(run: Run) -> Iterator[Tensor]:
    return embed.batches(run.held_out, run.preprocessing)


def whitened(run: Run, features: Pair) -> Pair:
    """Both sets, whitened by the training images."""
    dim = fusion.dimension(run.recipe, features[0].shape[1], len(features[0]))
    mean, basis = fusion.principal(features[0], dim, "scale", run.recipe.seed)
    return (features[0] - mean) @ basis, (features[1] - mean) @ basis


if __name__ == "__main__":
    main(experiment, SMALL, PAPER)
