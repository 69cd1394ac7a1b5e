"""What dispatched bundles are compared with: one mask trained on each domain in turn, fine-tuned copies, RanPAC."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.domain_sets import HeldOut, features
from cascade.bundle.format import Bundle
from cascade.engine.executors import Executor
from training import comparison, dispatcher, heads
from training.frozen import trained_head
from training.run import Run

RANDOM, RIDGE = 5000, 1e2  # RanPAC's features and penalty


def sequential(run: Run, steps: dict[str, int]) -> dict[str, float]:
    """Accuracy on each domain of one mask, and one head for all classes, trained on one domain after the other.

    Args:
        run: on all domains together; it resumes after the last finished domain.
        steps: of each domain, in the order of their arrival.
    """
    labels, truth = run.images.labels, run.held_out.labels
    assert labels is not None and truth is not None
    before = ""
    for nth, (name, count) in enumerate(steps.items()):
        model = run.masked(run.mask_from)
        if before:
            model.load_state(run.trained(before))
        rows = np.intersect1d(np.flatnonzero(np.isin(labels, _classes(run, name))), run.rows[0])
        head = run.folder / before if before else None
        before = f"sequential-{nth}"
        dispatcher.train(run, before, model=model, steps=count, rows=rows, head=head)
    guesses = heads.logits(trained_head(run, before).head, run.features(before)[1]).argmax(axis=1)
    own = {name: np.isin(truth, _classes(run, name)) for name in steps}
    return {name: float((guesses[rows] == truth[rows]).mean()) for name, rows in own.items()}


def fine_tuned(runs: dict[str, Run]) -> dict[str, float]:
    """Accuracy of a copy of the backbone for each domain, every weight trained from the masks' first stage on."""
    return {name: comparison.other(run, "fine-tuned").test for name, run in runs.items()}


def _classes(run: Run, name: str) -> list[int]:
    """The classes of a domain, among those of all."""
    return [i for i, label in enumerate(run.images.classes) if label.startswith(f"{name} ")]


def ranpac(
    executor: Executor, bundle: Bundle, folder: Path, sets: dict[str, HeldOut], seed: int = 0
) -> dict[str, float]:
    """Frozen features, a fixed random layer with ReLU, one ridge classifier over the classes of all domains."""
    files = sorted((folder / "joint" / "train").glob("*/*.png"))
    classes = sorted({file.parent.name for file in files})
    x = features(executor, bundle, [Image.open(file).convert("RGB") for file in files], None)
    y = torch.tensor([classes.index(file.parent.name) for file in files])
    layer = torch.randn(x.shape[1], RANDOM, generator=torch.Generator().manual_seed(seed)) / x.shape[1] ** 0.5
    mean, deviation = x.mean(dim=0), x.std(dim=0) + 1e-6

    def lifted(raw: Tensor) -> Tensor:
        return (((raw - mean) / deviation) @ layer).relu()

    h, targets = lifted(x), torch.nn.functional.one_hot(y, len(classes)).float()
    part = torch.arange(len(h)) % 5 == 0  # a fifth chooses the penalty
    grams = {True: h[~part].T @ h[~part], False: h.T @ h}
    eye = torch.eye(RANDOM)

    def solve(gram: Tensor, rows: Tensor, penalty: float) -> Tensor:
        return torch.linalg.solve(gram + penalty * eye, h[rows].T @ targets[rows])

    def right(penalty: float) -> float:
        return float(((h[part] @ solve(grams[True], ~part, penalty)).argmax(dim=1) == y[part]).float().mean())

    best = max([10.0, RIDGE, 1e3, 1e4, 1e5], key=right)
    weights = solve(grams[False], torch.ones_like(part), best)
    shares = {}
    for name, own in sets.items():
        guesses = (lifted(features(executor, bundle, own.images, None)) @ weights).argmax(dim=1)
        truth = [classes.index(f"{name} {label}") for label in own.classes]
        shares[name] = float((guesses == torch.tensor(truth)).float().mean())
    return shares
