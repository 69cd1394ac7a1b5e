"""Appendix F, figures 4 and 5: fewer trainable masks: first stages, random weights, the largest weights.

python -m training.experiments.selective
"""

from typing import Any

import numpy as np

from training.experiments import report
from training.experiments.lab import DEEP, Lab, knn, main, name_of, pair
from training.experiments.report import Table
from training.run import Run

SMALL = DEEP | {"seeds": 1}
PAPER = {"data": ("cifar10", "cifar100"), "epochs": 150}
UP_TO = {"small": ("blocks.6", "conv_head"), "paper": ("layer2", "layer3", "layer4")}
SHARES = {"small": (0.1, 0.5), "paper": (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)}


def experiment(lab: Lab) -> list[Table]:
    """Accuracy against the number of trainable masks and their bytes."""
    tables = []
    for name in lab.sets():
        short = name_of(name)
        table = Table(f"Figures 4 and 5, {short}: accuracy in % by what may be masked")
        for seed in lab.seeds:
            for way, changes in ways(lab, name).items():
                run = lab.trained(name, seed, **changes)
                count = trainable(run)
                cells = {"million masks": count / 1e6, "kB": (count + 7) // 8 / 1e3}
                table.add(way, cells | lab.columns(name, knn(run, pair(run, run.dispatcher))))
            lab.baselines(table, name, lab.run(name, seed))
        tables.append(table)
        curves: dict[str, list[tuple[float, float]]] = {}
        for row in (r for r in table.cells if "million masks" in table.cells[r]):
            kind = "random" if row.startswith("random") else "largest" if row.startswith("largest") else "first stages"
            point = table.mean(row, "million masks"), table.mean(row, f"{short} k-NN whitened")
            for curve in {"random", "largest", "first stages"} if row == "all" else {kind}:
                curves.setdefault(curve, []).append(point)
        drawn: dict[str, report.Curve] = {}
        for kind, points in sorted(curves.items()):
            x, y = zip(*sorted(points), strict=True)
            drawn[kind] = x, y
        report.draw(
            lab.path(f"selective.{short}.png"), {short: drawn}, "million trainable masks", "k-NN whitened, %", "o-"
        )
    return tables


def ways(lab: Lab, name: str) -> dict[str, dict[str, Any]]:
    """Changes of the recipe for each row; includes random draws of the same size as the first stages."""
    out: dict[str, dict[str, Any]] = {"all": {}}
    everything = trainable(lab.run(name))
    for stage in UP_TO[lab.preset]:
        out[f"before {stage}"] = {"mask_to": stage}
        share = trainable(lab.run(name, mask_to=stage)) / everything
        out[f"random, as many as before {stage}"] = {"select": "random", "select_share": round(share, 4)}
    for how in ("random", "largest"):
        for share in SHARES[lab.preset]:
            out[f"{how} {100 * share:.0f} %"] = {"select": how, "select_share": share}
    return out


def trainable(run: Run) -> int:
    """The weights that a run's mask may switch off. They follow from the recipe and need no storage."""
    inside = {s.parameter: s.stage for s in run.backbone.segments if run.mask_from <= s.stage < run.mask_to}
    if run.free is not None:
        return sum(int(np.count_nonzero(run.free[name].cpu().numpy())) for name in inside)
    return sum(end - begin for begin, end in (run.backbone.spans[name] for name in inside))


if __name__ == "__main__":
    main(experiment, SMALL, PAPER)
