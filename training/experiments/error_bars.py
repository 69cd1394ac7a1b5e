"""Table 6: five runs of the same mask, their mean and standard deviation.

python -m training.experiments.error_bars
"""

from training.experiments.lab import Lab, knn, main, name_of, pair
from training.experiments.report import Table

SMALL = {"seeds": 5}
PAPER = {"data": ("dtd", "ucf101"), "epochs": 150, "seeds": 5}
RUNS = {"dtd": (68.5, 67.8, 67.0, 67.8, 67.1, 67.6), "ucf101": (56.9, 57.6, 55.7, 57.4, 56.8, 56.9)}  # the mean last
COLUMNS = ("R1", "R2", "R3", "R4", "R5", "all")
PUBLISHED = {f"{name} k-NN": dict(zip(COLUMNS, values, strict=True)) for name, values in RUNS.items()}


def experiment(lab: Lab) -> list[Table]:
    """One column for each seed, and one for all of them."""
    table = Table("Table 6: runs that differ in their seed alone; accuracy in %", published=PUBLISHED)
    for name in lab.sets():
        for seed in lab.seeds:
            run = lab.trained(name, seed)
            for measure, value in knn(run, pair(run, run.dispatcher)).items():
                table.add(f"{name_of(run.recipe.data)} {measure}", {f"R{seed + 1}": value, "all": value})
        lab.baselines(table_of_controls := Table("Their controls; accuracy in %"), name, run)
    return [table, table_of_controls]


if __name__ == "__main__":
    main(experiment, SMALL, PAPER)
