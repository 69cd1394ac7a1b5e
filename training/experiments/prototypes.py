"""Table 1a: the number of prototypes, by k-NN accuracy.

python -m training.experiments.prototypes
"""

from training.experiments.lab import Lab, knn, main, pair
from training.experiments.report import Table

SMALL: dict[str, object] = {}
PAPER = {"data": ("cifar10", "dtd", "sun397"), "epochs": 150}
COUNTS = (50, 500, 5000)
PUBLISHED = {
    "50": {"cifar10 k-NN": 51.0, "dtd k-NN": 64.4, "sun397 k-NN": 50.3},
    "500": {"cifar10 k-NN": 92.1, "dtd k-NN": 67.4, "sun397 k-NN": 51.8},
    "5000": {"cifar10 k-NN": 92.0, "dtd k-NN": 64.0, "sun397 k-NN": 49.6},
}


def experiment(lab: Lab) -> list[Table]:
    """One mask for each number of prototypes, with the baselines."""
    table = Table("Table 1a: number of prototypes; accuracy in %", published=PUBLISHED)
    for name in lab.sets():
        for seed in lab.seeds:
            for count in COUNTS:
                run = lab.trained(name, seed, prototypes=count)
                table.add(str(count), lab.columns(name, knn(run, pair(run, run.dispatcher))))
            lab.baselines(table, name, run)
    return [table]


if __name__ == "__main__":
    main(experiment, SMALL, PAPER)
