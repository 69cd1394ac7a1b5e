"""Is an expert better on its own cluster than a mask that was trained on everything? Every routed method rests on that.

    python -m benchmarks.frontier.within                                   # after benchmarks.frontier: its masks
    python -m benchmarks.frontier.within --second 3000 --seeds 0           # six times the steps: trains its own
    python -m benchmarks.frontier.within --second 3000 --seeds 0 --each 5  # five times the training for the experts

Bank and queries are the training and the test images of one cluster alone, so that it does not matter whether two
experts' spaces agree, nor how blocks are fused. Means over the clusters, weighed by their test images.
"""

import sys
from itertools import product
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.frontier import sets
from benchmarks.frontier.learn import Budget
from benchmarks.frontier.methods import dispatcher, experts, routed, single
from benchmarks.frontier.study import NEIGHBOURS, Pair, Study, open_study, probe_all
from cascade.errors import CascadeError
from training.evaluate import knn

Scores = dict[str, list[tuple[int, float, float]]]
"""By mask, for each cluster: its test images, k-NN and probe in points."""


def main() -> None:
    options = sets.options(__doc__)
    options.add_argument("--second", type=int, default=Budget().second, help="steps of the mask on everything")
    options.add_argument("--each", type=int, default=1, help="times the mask's steps that all experts have together")
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    steps = f"{chosen.second} steps, experts {chosen.second * chosen.each // Budget().experts} each"
    table = Table("backbone", "data", "frozen", "dispatcher", "on everything", "experts", "better experts", title=steps)
    for name, of in product(chosen.backbones, chosen.sets):
        found = [measure(chosen.folder, name, of, int(seed), chosen.second, chosen.each) for seed in chosen.seeds]
        table.add_row(name, of, *(cell([average(f[m]) for f in found]) for m in found[0]), better(found))
        print(name, of, flush=True)
    Console().print(table)


def measure(folder: Path, name: str, of: str, seed: int, second: int, each: int) -> Scores:
    """All clusters of one backbone, data set and seed."""
    usual = Budget()
    own = folder / (sets.MASK_FROM if (second, each) == (usual.second, 1) else f"second-{second}")
    features = folder / sets.MASK_FROM / "features"
    study = open_study(name, of, seed, sets.MASK_FROM, features, own / name / of / str(seed))
    first = dispatcher(study)
    shared = single(study, "unrouted", second, start=study.dispatcher())
    names = experts(study, "expert" if each == 1 else f"expert-{each}", steps=second * each // usual.experts)
    masks = {"frozen": study.frozen, "dispatcher": first, "on everything": shared, "experts": routed(study, names)}
    return {mask: clusters(study, pair) for mask, pair in masks.items()}


def clusters(study: Study, features: Pair) -> list[tuple[int, float, float]]:
    """Test images, k-NN and probe of each cluster, by features [N, F] and [M, F] of all images."""
    data, out = study.data, []
    trained, queried = study.assigned(study.budget.experts)
    for k in range(study.budget.experts):
        rows = np.flatnonzero(trained == k)
        asked = np.flatnonzero((queried == k) & ~data.validation)
        known, truth = torch.from_numpy(data.labels[rows]), data.held_out_labels[asked]
        if len(asked) == 0 or len(set(data.labels[rows])) < 2:
            continue  # nothing to tell apart
        bank, queries = study.fused((features[0][rows], features[1][asked]))
        near = knn(bank.float(), queries.float(), known, torch.from_numpy(truth), NEIGHBOURS)
        out.append((len(asked), 100 * near, 100 * float((probe_all((bank, queries), known) == truth).mean())))
    return out


def average(found: list[tuple[int, float, float]]) -> tuple[float, float]:
    """k-NN and probe over all clusters."""
    total = sum(n for n, _, _ in found)
    return sum(n * k for n, k, _ in found) / total, sum(n * p for n, _, p in found) / total


def better(found: list[Scores]) -> str:
    """In how many clusters of all seeds the expert is above the mask on everything, in k-NN and in the probe."""
    pairs = [pair for f in found for pair in zip(f["experts"], f["on everything"], strict=True)]
    return "  ".join(f"{sum(e[m] > s[m] for e, s in pairs)}" for m in (1, 2)) + f" of {len(pairs)}"


def cell(values: list[tuple[float, float]]) -> str:
    """k-NN and probe, mean and standard deviation over the seeds."""
    both = list(zip(*values, strict=True))
    return "  ".join(f"{mean(v):.1f}" + (f"±{stdev(v):.1f}" if len(v) > 1 else "") for v in both)


if __name__ == "__main__":
    try:
        main()
    except CascadeError as error:
        sys.exit(f"error: {error}")
