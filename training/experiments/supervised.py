"""Main tables 1 and 2: masks against full fine-tuning, with labels (and a new head) and without; linear probes.

python -m training.experiments.supervised
"""

from pathlib import Path
from typing import Any

import numpy as np

from cascade.model import masks
from training import dispatcher, embed, finetune
from training.experiments.lab import DEEP, Lab, Pair, knn, labels, main, pair, probe
from training.experiments.report import Table
from training.run import Run

SMALL = DEEP | {"seeds": 1, "limit": 20_000, "test_limit": 4000, "batch": 64, "steps": 1500}
PAPER = {"data": ("cifar10", "cifar100", "dtd", "eurosat"), "epochs": 150}
MASK: dict[str, dict[str, Any]] = {
    "small": {"labels": True, "clusters": 0, "optimizer": "adam", "lr": 0.02, "head_lr": 0.001, "head_steps": 0},
    "paper": {"labels": True, "clusters": 0, "warmup": 40 / 150, "head_lr": 0.15, "head_steps": 0},
}
# As in the paper; it switches more weights off, and gives worse masks in few steps.
SGD: dict[str, dict[str, Any]] = {
    "small": MASK["small"] | {"optimizer": "sgd", "lr": 5.0, "head_lr": 0.02},
    "paper": MASK["paper"],
}
HEAD_FIRST = {"small": True, "paper": False}  # mask and weights start from the head that was trained alone
TUNED: dict[str, dict[str, Any]] = {  # full fine-tuning without labels, or with few
    "small": {"optimizer": "sgd", "lr": 0.001, "weight_decay": 1e-6},
    "paper": {"optimizer": "sgd", "lr": 0.15, "weight_decay": 1e-6},
}
TUNED_WITH_LABELS: dict[str, dict[str, Any]] = TUNED | {
    "small": {"optimizer": "adamw", "lr": 0.001, "weight_decay": 1e-4},
}
SETS = ("cifar10", "cifar100", "dtd", "eurosat")
ACCURACY = {"supervised mask": (96.2, 79.8, 70.9, 97.4), "supervised full fine-tuning": (96.5, 81.7, 73.6, 97.7)}
ACTIVE = {"supervised mask": (89.5, 77.2, 95.1, 95.7), "self-supervised mask": (91.4, 92.5, 98.8, 96.7)}
PUBLISHED: dict[str, dict[str, float]] = {
    row: {f"{name} accuracy": value for name, value in zip(SETS, values, strict=True)}
    for row, values in ACCURACY.items()
}
for title, shares in ACTIVE.items():
    PUBLISHED.setdefault(title, {}).update({f"{n} active %": v for n, v in zip(SETS, shares, strict=True)})


def experiment(lab: Lab) -> list[Table]:
    """Accuracy of the trained head, of a probe and of neighbors, and the share of active weights."""
    table = Table("Main tables 1 and 2: masks and full fine-tuning; accuracy in %", published=PUBLISHED)
    for name in lab.sets():
        for seed in lab.seeds:
            for row, cells in rows(lab, name, seed).items():
                table.add(row, lab.columns(name, cells))
    return [table]


def rows(lab: Lab, name: str, seed: int) -> dict[str, dict[str, float]]:
    """One seed of one data set, by method."""
    mask, tuned = MASK[lab.preset], TUNED[lab.preset]
    run = lab.trained(name, seed)
    out = {"frozen backbone": _plain(run, pair(run, None))}
    out["self-supervised mask"] = _plain(run, pair(run, run.dispatcher)) | _active(run)
    out["self-supervised full fine-tuning"] = _plain(run, tuned_features(lab.run(name, seed, **tuned)))
    run = lab.run(name, seed, **mask)
    head = run.folder / "zero-rate" if HEAD_FIRST[lab.preset] else None
    dispatcher.train(run, "zero-rate", lr=0.0)
    out["supervised, learning rate zero: the head alone"] = _headed(run, "zero-rate")
    if head:
        dispatcher.train(run, "zero-rate-on", lr=0.0, head=head)
        out["the head alone, twice the steps"] = _headed(run, "zero-rate-on")
    which = "after-head" if head else "dispatcher"
    dispatcher.train(run, which, head=head)
    out["supervised mask"] = _headed(run, which) | _active(run, which)
    run = lab.run(name, seed, **(mask | TUNED_WITH_LABELS[lab.preset]))
    which = "after-head" if head else "fine-tuned"
    features = tuned_features(run, which, head)
    out["supervised full fine-tuning"] = {"accuracy": accuracy(run, which, features[1])} | _plain(run, features)
    return out


def accuracy(run: Run, name: str, features: np.ndarray) -> float:
    """Accuracy in % of the head from the training ``name``, on held-out features [N, F]."""
    predicted = finetune.logits(run, name, features).argmax(axis=1)
    return 100 * float(np.mean(predicted == labels(run)[1].numpy()))


def tuned_features(run: Run, name: str = "fine-tuned", head: Path | None = None) -> Pair:
    """Features of both sets after full fine-tuning."""
    model = finetune.train(run, name, head=head)
    train, test = (
        finetune.features(model, embed.batches(images, run.preprocessing)) for images in (run.images, run.held_out)
    )
    return train, test


def _headed(run: Run, name: str) -> dict[str, float]:
    features = pair(run, run.mask(name, run.mask_from))
    return {"accuracy": accuracy(run, name, features[1])} | _plain(run, features)


def _plain(run: Run, features: Pair) -> dict[str, float]:
    return probe(run, features, plain=False) | knn(run, features)


def _active(run: Run, name: str = "dispatcher") -> dict[str, float]:
    return {"active %": 100 * masks.density(run.backbone, run.mask(name, run.mask_from))}


if __name__ == "__main__":
    main(experiment, SMALL, PAPER)
