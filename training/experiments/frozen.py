"""Table 1b: which parameters are not masked: none, those of BatchNorm (the default), or all biases.

python -m training.experiments.frozen
"""

from torch import nn

from cascade.model import backbone as backbones
from training import dispatcher
from training.experiments.lab import DEEP, Lab, knn, main, pair
from training.experiments.report import Table
from training.run import Run, device

SMALL = DEEP | {"seeds": 2}
PAPER = {"data": ("cifar10", "dtd", "sun397"), "epochs": 150}
PUBLISHED = {
    "none": {"cifar10 k-NN": 56.0, "dtd k-NN": 43.4, "sun397 k-NN": 17.7},
    "BNs": {"cifar10 k-NN": 92.1, "dtd k-NN": 67.4, "sun397 k-NN": 51.8},
    "biases": {"cifar10 k-NN": 68.1, "dtd k-NN": 50.5, "sun397 k-NN": 26.6},
}


def everything(model: nn.Module) -> dict[str, int]:
    """All parameters, including those of BatchNorm; fused ones in their usual row blocks."""
    return {name: 1 for name, _ in model.named_parameters()} | backbones.maskable(model)


def no_biases(model: nn.Module) -> dict[str, int]:
    """All parameters except biases, so weights of BatchNorm are masked."""
    return {name: rows for name, rows in everything(model).items() if not name.endswith("bias")}


MASKED = {"none": everything, "BNs": backbones.maskable, "biases": no_biases}


def experiment(lab: Lab) -> list[Table]:
    """One mask for each choice, with the baselines."""
    table = Table("Table 1b: what stays out of the mask; accuracy in %", published=PUBLISHED)
    for name in lab.sets():
        for seed in lab.seeds:
            for kept in MASKED:
                run = open_run(lab, name, seed, kept)
                dispatcher.train(run)
                table.add(kept, lab.columns(name, knn(run, pair(run, run.dispatcher))))
            lab.baselines(table, name, lab.run(name, seed))
    return [table]


def open_run(lab: Lab, name: str, seed: int, kept: str) -> Run:
    """A run with a different set of maskable parameters."""
    run = lab.run(name, seed, variant="" if kept == "BNs" else f"frozen {kept}")
    run.backbone = backbones.load(run.recipe.backbone, run.recipe.source, device=device(), masked=MASKED[kept])
    return run


if __name__ == "__main__":
    main(experiment, SMALL, PAPER)
