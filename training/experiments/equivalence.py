"""Appendix A, figure 1: equivalent hyperparameters give the same curves and masks; a single change does not.

python -m training.experiments.equivalence

Doubling rate and initial score is exact in floating point, too (a factor of two only changes exponents); shifting score
and threshold rounds differently, so masks may eventually differ in some bits.
"""

import json
from pathlib import Path

import numpy as np

from cascade.model import masks
from training.curve import CURVE
from training.experiments import report
from training.experiments.lab import DEEP, Lab, main, name_of
from training.experiments.report import Table
from training.experiments.supervised import SGD

SMALL = DEEP | {"steps": 40, "optimizer": "sgd", "lr": 50.0, "seeds": 1}
PAPER = {"data": ("cifar10",), "epochs": 150}
SETTINGS = {  # factors and summands: (lr x, S0 x then +, mu +)
    "standard": (1, 1, 0.0, 0.0),
    "rate and scores doubled, scores and threshold shifted": (2, 2, 0.5, 0.5),
    "rate and scores doubled": (2, 2, 0.0, 0.0),
    "rate doubled": (2, 1, 0.0, 0.0),
    "scores doubled": (1, 2, 0.0, 0.0),
    "threshold shifted": (1, 1, 0.0, 0.5),
}
SAME = 3  # the first ones are equivalent
WINDOW = 10  # steps averaged in one point of the figure


def experiment(lab: Lab) -> list[Table]:
    """Loss and mask of each setting, compared with the standard setting."""
    table = Table("Figure 1: supervised masks of equivalent and of other hyperparameters", digits=4)
    for name in lab.sets():
        drawn: dict[str, report.Curve] = {}
        for seed in lab.seeds:
            first = None
            for rate, factor, shift, threshold in SETTINGS.values():
                r = lab.recipe
                initial = r.initial * factor + shift
                changes = {"lr": r.lr * rate, "initial": initial, "threshold": r.threshold + threshold}
                run = lab.trained(name, seed, **(SGD[lab.preset] | changes))
                title = f"({run.recipe.lr:g}, {initial:g}, {run.recipe.threshold:g})"
                loss = losses(run.folder / "dispatcher" / CURVE)
                first = first or (loss, run.dispatcher)
                cells = {
                    "last losses": float(loss[-WINDOW:].mean()),
                    "largest difference of losses": float(np.abs(loss - first[0]).max()),
                    "% of bits that differ": 100 * masks.difference(first[1], run.dispatcher, run.backbone),
                    "% active": 100 * masks.density(run.backbone, run.dispatcher),
                }
                table.add(title, lab.columns(name, cells))
                if seed == lab.seeds[0]:
                    drawn[title] = smooth(loss)
        curves = list(drawn.items())
        panels = {"equivalent": dict(curves[:SAME]), "one change alone": dict([curves[0], *curves[SAME:]])}
        report.draw(lab.path(f"equivalence.{name_of(name)}.png"), panels, "step", "loss")
    return [table]


def losses(path: Path) -> np.ndarray:
    """Loss of every step of a curve, float64 [steps]."""
    return np.array([json.loads(line)["loss"] for line in path.read_text().splitlines()])


def smooth(loss: np.ndarray) -> report.Curve:
    """Running means, with the last step of each."""
    window = min(WINDOW, len(loss))
    means = np.convolve(loss, np.ones(window) / window, "valid")
    return list(range(window - 1, len(loss))), list(means)


if __name__ == "__main__":
    main(experiment, SMALL, PAPER)
