"""The paper's main tables: frozen backbone, one mask, conditional and unconditional cascade, and their controls.

python -m training.experiments.main

Every method is listed with and without whitening, next to pixels, the control at learning rate zero, and one mask that
was trained for all the steps of the cascade.
"""

from training import clusters, dispatcher, evaluate, experts
from training.experiments.lab import Lab, knn, main, name_of, pixels, probe
from training.experiments.report import Table

SMALL = {"data": ("cifar10", "fashion-mnist"), "seeds": 2}
PAPER = {"data": ("cifar100", "inatloc500"), "epochs": 150}
PUBLISHED = {
    "frozen backbone": {"cifar100 k-NN": 49.7},
    "dispatcher": {"cifar100 k-NN": 65.6, "cifar100 probe": 76.9, "inatloc500 k-NN": 26.3},
    "conditional": {"cifar100 k-NN whitened": 75.2, "cifar100 probe whitened": 79.3, "inatloc500 k-NN whitened": 39.5},
    "unconditional": {
        "cifar100 k-NN whitened": 77.8,
        "cifar100 probe whitened": 80.7,
        "inatloc500 k-NN whitened": 42.4,
    },
}


def experiment(lab: Lab) -> list[Table]:
    """One table per data set: k-NN plain, whitened, and whitened as the paper's text says; linear probe."""
    tables = []
    for name in lab.sets():
        short = name_of(name)
        published = {
            row: {c.removeprefix(f"{short} "): v for c, v in cells.items() if c.startswith(short)}
            for row, cells in PUBLISHED.items()
        }
        table = Table(f"Main table, {short}; accuracy in %", published=published)
        for seed in lab.seeds:
            run = lab.trained(name, seed)
            dispatcher.controls(run)
            clusters.fit(run)
            experts.train(run)
            raw = pixels(run.images), pixels(run.held_out)
            table.add("pixels, 8 x 8", knn(run, raw, eigenvalue=True) | probe(run, raw, plain=not lab.small))
            for method, parts in evaluate.methods(run, evaluate.collect(run)):
                joined = evaluate.joined(parts[0]).numpy(), evaluate.joined(parts[1]).numpy()
                scores = knn(run, joined, eigenvalue=True) | probe(run, joined, plain=not lab.small)
                table.add(method, scores)
        tables.append(table)
    return tables


if __name__ == "__main__":
    main(experiment, SMALL, PAPER)
