"""What dispatched bundles are compared with: one mask trained on each domain in turn, fine-tuned copies, RanPAC."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cascade.bundle.format import strip_prefix
from cascade.model.heads import Linear
from training import comparison, dispatcher, heads
from training.comparison import Row
from training.run import Run

RANDOM = 5000  # RanPAC's features
PENALTIES = (10.0, 1e2, 1e3, 1e4, 1e5)
Shares = dict[str, float]
"""In [0, 1] for each domain."""


def sequential(run: Run, steps: dict[str, int]) -> list[Shares]:
    """Accuracy of one mask, and one head for all classes, trained on one domain after the other.

    Args:
        run: on all domains together; it resumes after the last finished domain.
        steps: of each domain, in the order of their arrival.

    Returns:
        After each arrival, the accuracy on each of the domains so far.
    """
    names, arrivals = list(steps), list[Shares]()
    before = ""
    for nth, (name, count) in enumerate(steps.items()):
        model = run.masked(run.mask_from)
        if before:
            model.load_state(run.trained(before))
        assert run.images.labels is not None
        rows = np.intersect1d(np.flatnonzero(np.isin(run.images.labels, _classes(run, name))), run.rows[0])
        head = run.folder / before if before else None
        before = f"sequential-{nth}"
        dispatcher.train(run, before, model=model, steps=count, rows=rows, head=head)
        own = strip_prefix(run.trained(before), "objective.")
        found = run.embedded(run.mask(before, run.mask_from), "test")
        guesses = heads.logits(Linear(own["weight"], own["bias"]), found).argmax(axis=1)
        arrivals.append(_shares(run, names[: nth + 1], guesses))
    return arrivals


def fine_tuned(runs: dict[str, Run]) -> dict[str, Row]:
    """A copy of the backbone for each domain, every weight trained from the masks' first stage on."""
    return {name: comparison.other(run, "fine-tuned") for name, run in runs.items()}


def ranpac(run: Run, names: Sequence[str]) -> list[Shares]:
    """RanPAC (McDonnell et al. 2023): frozen features, a fixed random layer with ReLU, one ridge classifier.

    It is fitted anew after each arrival, to all images so far. This equals adding the sums over the new images, except
    that the scale of the features is also that of all images so far, which can only help.

    Args:
        run: on all domains together.

    Returns:
        After each arrival, the accuracy on each of the domains so far.
    """
    train, test = (torch.from_numpy(x) for x in run.features("frozen"))
    labels = torch.from_numpy(run.images.labels)
    arrivals = []
    for nth in range(1, len(names) + 1):
        known = [label for name in names[:nth] for label in _classes(run, name)]
        rows = torch.isin(labels, torch.tensor(known))
        guesses = _ridge(train[rows], labels[rows], test, run.recipe.seed)
        arrivals.append(_shares(run, names[:nth], guesses.numpy()))
    return arrivals


def _ridge(x: Tensor, y: Tensor, queries: Tensor, seed: int) -> Tensor:
    """The classes of queries float32 [M, F] by ridge regression on random features; a fifth chooses the penalty."""
    classes, y = y.unique(return_inverse=True)
    layer = torch.randn(x.shape[1], RANDOM, generator=torch.Generator().manual_seed(seed)) / x.shape[1] ** 0.5
    mean, deviation = x.mean(dim=0), x.std(dim=0) + 1e-6

    def lifted(raw: Tensor) -> Tensor:
        return (((raw - mean) / deviation) @ layer).relu()

    h, targets = lifted(x), torch.nn.functional.one_hot(y, len(classes)).float()
    fifth = torch.arange(len(h)) % 5 == 0
    held = h[fifth]
    gram, sums = h.T @ h, h.T @ targets
    less_gram, less_sums = gram - held.T @ held, sums - held.T @ targets[fifth]

    def solve(gram: Tensor, sums: Tensor, penalty: float) -> Tensor:
        return torch.linalg.solve(gram + penalty * torch.eye(len(gram)), sums)

    def right(penalty: float) -> int:
        return int(((held @ solve(less_gram, less_sums, penalty)).argmax(dim=1) == y[fifth]).sum())

    weights = solve(gram, sums, max(PENALTIES, key=right))
    return classes[(lifted(queries) @ weights).argmax(dim=1)]


def _classes(run: Run, name: str) -> list[int]:
    """The classes of a domain, among those of all."""
    return [i for i, label in enumerate(run.images.classes) if label.startswith(f"{name} ")]


def _shares(run: Run, names: Sequence[str], guesses: np.ndarray) -> Shares:
    """Accuracy on each domain, from the guessed classes of all test images, int64 [N]."""
    truth = run.held_out.labels
    assert truth is not None
    own = {name: np.isin(truth, _classes(run, name)) for name in names}
    return {name: float((guesses[rows] == truth[rows]).mean()) for name, rows in own.items()}
