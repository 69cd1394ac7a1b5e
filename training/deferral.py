"""A larger input size for images about which a trained classifier is unsure: head, threshold, and what it is worth.

The head is fitted to the features of the frozen backbone, or of the trained mask, at the larger size; or that size has
a mask and head of its own. The validation images choose. The threshold is the lowest that still has, on those images,
the accuracy of always asking the larger size less what may be lost.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from cascade.bundle.bundle import Bundle
from cascade.bundle.schema import DeferralCard, MaskCard
from cascade.engine.results import INPUT_MODES
from cascade.errors import CascadeError
from cascade.model.fusion import Identity
from cascade.model.heads import Linear
from cascade.model.masks import Mask, density, difference, frozen
from cascade.model.preprocessing import Preprocessing
from cascade.model.router import Calibration
from training.frozen import Candidate, fitted_head, trained_head
from training.run import SPLITS, Run, Split

TIMED, BATCH = 7, 16  # batches that the cost is measured with, and their images
ALWAYS = 2.0  # a threshold above every confidence


@dataclass(frozen=True)
class Larger:
    """What a bundle stores of its larger input size.

    Attributes:
        head: float16 weights.
    """

    preprocessing: Preprocessing
    mask: Mask
    head: Linear
    card: DeferralCard

    def attach(self, bundle: Bundle) -> Bundle:
        """The bundle with the larger size."""
        card = bundle.card.model_copy(update={"deferral": self.card})
        own = card.larger()
        assert own is not None
        larger = Bundle(
            name=bundle.name,
            version=bundle.version,
            card=own,
            preprocessing=self.preprocessing,
            dispatcher=self.mask,
            experts=(),
            router=None,
            calibration=Calibration(),
            ood=None,
            fusions={"dispatcher": Identity.of(card.dim)},
            linear={"dispatcher": self.head},
        )
        return replace(bundle, card=card, larger=larger)


@dataclass(frozen=True)
class Network:
    """A head, and the run that trained the adapter below it: what an input size may serve.

    Attributes:
        candidate: its name is that of the adapter in ``run``, or ``frozen``.
        other: preprocessing to use instead of the run's.
    """

    run: Run
    candidate: Candidate
    other: Preprocessing | None = None

    @property
    def preprocessing(self) -> Preprocessing:
        return self.other or self.run.preprocessing

    @property
    def is_frozen(self) -> bool:
        return self.candidate.name == "frozen"

    @property
    def title(self) -> str:
        """For people."""
        return "the frozen backbone" if self.is_frozen else f"the adapter trained at {self.run.preprocessing.size} px"

    def features(self) -> tuple[np.ndarray, np.ndarray]:
        """Of the training and the held-out images, float32 [N, F]."""
        return self.run.features(self.candidate.name, self.other)

    def mask(self) -> Mask:
        return frozen(self.run.backbone) if self.is_frozen else self.run.mask(self.candidate.name, self.run.mask_from)


@dataclass(frozen=True)
class Answers:
    """What both sizes answer for the same images.

    Attributes:
        confidence: of the small one, in [0, 1], float32 [N].
        small, large: which images each has right, bool [N].
    """

    confidence: np.ndarray
    small: np.ndarray
    large: np.ndarray

    @classmethod
    def of(cls, small: Tensor, large: Tensor, labels: np.ndarray) -> "Answers":
        """Of probabilities [N, classes] under either head."""
        confidence, answer = small.max(dim=1)
        return cls(confidence.numpy(), answer.numpy() == labels, large.argmax(dim=1).numpy() == labels)

    def at(self, threshold: float) -> tuple[float, float]:
        """Accuracy, and the share of images that are asked again."""
        again = self.confidence < threshold
        return float(np.where(again, self.large, self.small).mean()), float(again.mean())

    def threshold(self, lose: float) -> float:
        """The lowest with an accuracy of at least that of always asking the larger size less ``lose`` points."""
        values = np.unique(self.confidence).astype(np.float64)
        goal = float(self.large.mean()) - lose / 100
        between = [0.0, *((values[1:] + values[:-1]) / 2), 1.0]
        return float(next((t for t in between if self.at(t)[0] >= goal - 1e-9), 1.0))


def preprocessing_of(run: Run, size: int) -> Preprocessing:
    """Of the larger size, checked before anything is trained.

    Raises:
        CascadeError: it isn't larger, or the backbone can't take it, or there are no labels to fit a head to.
    """
    if not run.recipe.labels:
        raise CascadeError("--defer-to fits a head at a second input size: give --labels, too")
    if size <= run.preprocessing.size:
        raise CascadeError(f"--defer-to {size} is not larger than the input of {run.preprocessing.size} px")
    try:
        run.executor.run(torch.zeros(1, 3, size, size, device=run.backbone.weights.device))
    except (AssertionError, RuntimeError) as error:
        why = str(error).splitlines()[0]
        raise CascadeError(f"{run.recipe.backbone} can't take images of {size} px ({why}): try another size") from error
    return Preprocessing.of(run.backbone.config, size, run.recipe.crop_pct or None)


def at_size(run: Run, size: int) -> Run:
    """The run beside ``run`` that trains a mask of its own for the larger size."""
    return run.beside(str(size), size=size)


def fit(
    run: Run, small: Candidate, names: Sequence[str], size: int, lose: float, trained: Run | None = None
) -> Larger | None:
    """The larger size for a trained classifier; None where it would not pay, which is said.

    Args:
        small: what the bundle serves.
        names: what the larger size may run under: ``frozen``, and the masks that were trained for the small one.
        lose: points of accuracy that may be lost against always asking the larger size.
        trained: the finished run of ``at_size``, if the larger size may also have that mask.
    """
    served, found = Network(run, small), networks(run, names, preprocessing_of(run, size), trained)
    if len(found) > 1:
        listed = (f"{each.title} {100 * each.candidate.validation:.1f} %" for each in found)
        run.watch.say(f"at {size} px, of the validation images: {', '.join(listed)}")
    large = best(found)
    if not large.candidate.validation > small.validation:
        shares = f"{100 * large.candidate.validation:.1f} % of the validation images against"
        shares += f" {100 * small.validation:.1f} %"
        run.watch.say(f"{size} px are no better than {run.preprocessing.size} px ({shares}): no image is asked again")
        return None
    validation, test = (answers(served, large, split) for split in SPLITS)
    assert validation is not None
    threshold = validation.threshold(lose)
    share = validation.at(threshold)[1]
    if share == 0:
        run.watch.say(
            f"{run.preprocessing.size} px lose less than {lose:g} points against {size} px: nothing to ask again"
        )
        return None
    mask = replace(large.mask(), name="dispatcher")
    measured = {
        "serves": "frozen" if large.is_frozen else run.recipe.adapt,
        "validation_images": len(run.rows[1]),
        "held_out_images": len(run.held_out),
        "modes": {mode: _figures(mode, validation, test, threshold) for mode in INPUT_MODES},
    }
    if not large.is_frozen:
        measured["trained_at"] = large.run.preprocessing.size
    run.watch.show(show(measured, _passes(served, large)))
    card = DeferralCard(
        threshold=threshold,
        lose=lose,
        share=share,
        accuracy=measured,
        preprocessing=large.preprocessing.to_json(),
        mask=MaskCard(
            name="dispatcher",
            start=mask.start,
            weights=run.backbone.weights.numel() - run.backbone.offset(mask.start),
            density=round(density(run.backbone, mask), 4),
            differs_from_dispatcher=round(difference(mask, served.mask(), run.backbone), 4),
        ),
    )
    return Larger(large.preprocessing, mask, half(large.candidate.head), card)


def show(measured: dict[str, Any], passes: float) -> Table:
    """Accuracy and cost of each mode.

    Args:
        passes: of the small size that one of the larger size takes, by time; not in the bundle, whose bytes it would
            change.
    """
    table = Table("mode", "validation %", "held-out %", "asked again %", "cost in passes of the small size, by time")
    for mode, row in measured["modes"].items():
        shown = row | {"again": None} if mode == "full" else row
        shares = ("-" if shown[k] is None else f"{100 * shown[k]:.1f}" for k in ("validation", "test", "again"))
        table.add_row(mode, *shares, f"{passes if mode == 'full' else 1 + row['again'] * passes:.2f}")
    return table


def networks(run: Run, names: Sequence[str], preprocessing: Preprocessing, trained: Run | None = None) -> list[Network]:
    """What the larger size may serve, the cheapest first: ``names`` with heads fitted to it, and a mask of its own."""
    found = [Network(run, fitted_head(run, name, preprocessing), preprocessing) for name in names]
    return found if trained is None else [*found, Network(trained, trained_head(trained, "dispatcher"))]


def best(found: Sequence[Network]) -> Network:
    """That which the validation images prefer; of equals the first."""
    return max(found, key=lambda each: each.candidate.validation)


def half(head: Linear) -> Linear:
    """As a bundle stores it: float16 weights."""
    return Linear(head.weight.half(), head.bias)


def answers(small: Network, large: Network, split: Split) -> Answers | None:
    """Of the validation images (``train``) or the test images; None where those have no labels."""
    run, part = small.run, SPLITS.index(split)
    labels = (run.images if split == "train" else run.held_out).labels
    if labels is None:
        return None
    rows = run.rows[1] if split == "train" else np.arange(len(labels))
    scores = [
        half(each.candidate.head).scores(torch.from_numpy(each.features()[part][rows])) for each in (small, large)
    ]
    return Answers.of(scores[0], scores[1], labels[rows])


def _figures(mode: str, validation: Answers, test: Answers | None, threshold: float) -> dict[str, float | None]:
    """Accuracy in [0, 1], and the share of the test images (without labels: validation images) that is asked again."""
    at = {"fast": 0.0, "adaptive": threshold, "full": ALWAYS}[mode]
    accuracy, again = validation.at(at)
    measured, again = (None, again) if test is None else test.at(at)
    share = 0.0 if mode == "full" else again
    return {"validation": round(accuracy, 4), "test": None if measured is None else round(measured, 4), "again": share}


@torch.inference_mode()
def _passes(small: Network, large: Network) -> float:
    """Passes of the small size that one of the larger size takes, by time; each under its mask."""
    executor, device = small.run.executor, small.run.backbone.weights.device
    masks = [None if each.is_frozen else each.mask() for each in (small, large)]
    sides = [each.preprocessing.size for each in (small, large)]
    images = [torch.zeros(BATCH, 3, side, side, device=device) for side in sides]
    seconds: tuple[list[float], list[float]] = [], []
    for _ in range(TIMED):  # in turns, so that a busy moment meets both
        for mask, x, spent in zip(masks, images, seconds, strict=True):
            executor.swap(mask)
            begin = time.perf_counter()
            float(executor.run(x).sum())  # a number on the host: a GPU is waited for
            spent.append(time.perf_counter() - begin)
    executor.swap(None)
    return median(seconds[1][1:]) / median(seconds[0][1:])
