"""Figure 3 of the main paper: 10 to 0.25 % of the labels, on masks that were trained without any.

python -m training.experiments.low_shot
"""

import numpy as np
import torch

from training import data, evaluate, fuse
from training.experiments import report
from training.experiments.lab import Lab, Pair, labels, main, pair
from training.experiments.report import Table
from training.run import Run

SMALL: dict[str, object] = {}
PAPER = {"data": ("cifar100",), "epochs": 150}
SHARES = (10, 4, 2, 1, 0.5, 0.25)  # % of the labels


def experiment(lab: Lab) -> list[Table]:
    """k-NN and probe on few labels; the whitening is fitted on all images, as it needs no label."""
    tables = []
    for name in lab.sets():
        short = name.rpartition("/")[2]
        table = Table(f"Main figure 3, {short}: accuracy in % by share of the labels")
        for seed in lab.seeds:
            run = lab.trained(name, seed)
            for method, mask in (("frozen backbone", None), ("mask", run.dispatcher)):
                features = pair(run, mask)
                for way, both in (("", features), (" whitened", whitened(run, features))):
                    for kind, cells in few(run, both, seed).items():
                        table.add(f"{method}, {kind}{way}", cells)
        tables.append(table)
        curves = {row: (SHARES, [table.mean(row, f"{s} %") for s in SHARES]) for row in table.cells}
        report.draw(lab.path(f"low_shot.{short}.png"), {short: curves}, "% of the labels", "accuracy in %", "o-")
    return tables


def few(run: Run, features: Pair, seed: int) -> dict[str, dict[str, float]]:
    """Accuracies of k-NN and probe, by share."""
    known, truth = labels(run)
    order = data.evenly(known.numpy(), seed)
    classes = len(np.unique(known.numpy()))
    out: dict[str, dict[str, float]] = {"k-NN": {}, "probe": {}}
    for share in SHARES:
        rows = torch.from_numpy(order[: max(classes, round(share / 100 * len(order)))])
        bank, queries = torch.from_numpy(features[0])[rows], torch.from_numpy(features[1])
        k = min(run.recipe.neighbours, max(1, len(rows) // classes))  # more would be of other classes
        out["k-NN"][f"{share} %"] = 100 * evaluate.knn(bank, queries, known[rows], truth, k)
        out["probe"][f"{share} %"] = 100 * evaluate.probe(bank, queries, known[rows], truth)
    return out


def whitened(run: Run, features: Pair) -> Pair:
    """Both sets through the training images' whitening."""
    dim = fuse.dimension(run.recipe, features[0].shape[1], len(features[0]))
    mean, basis = fuse.principal(features[0], dim, "scale", run.recipe.seed)
    return (features[0] - mean) @ basis, (features[1] - mean) @ basis


if __name__ == "__main__":
    main(experiment, SMALL, PAPER)
