"""A larger input size for images about which a trained classifier is unsure: head, threshold, and what it is worth.

The head is fitted to the features of the frozen backbone, or of the trained mask, at the larger size: whichever is
better on the validation images. The threshold is the lowest that still has, on those images, the accuracy of always
asking the larger size less what may be lost.
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
from cascade.model.masks import Mask, density, frozen
from cascade.model.preprocessing import Preprocessing
from cascade.model.router import Calibration
from training.frozen import Candidate, fitted_head
from training.run import Run

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


def fit(run: Run, small: Candidate, names: Sequence[str], size: int, lose: float) -> Larger | None:
    """The larger size for a trained classifier; None where it would not pay, which is said.

    Args:
        small: what the bundle serves.
        names: what the larger size may run under: ``frozen``, and the masks that were trained.
        lose: points of accuracy that may be lost against always asking the larger size.
    """
    preprocessing = preprocessing_of(run, size)
    large = best(run, names, preprocessing)
    if not large.validation > small.validation:
        shares = f"{100 * large.validation:.1f} % of the validation images against {100 * small.validation:.1f} %"
        run.watch.say(f"{size} px are no better than {run.preprocessing.size} px ({shares}): no image is asked again")
        return None
    validation, test = (answers(run, small, large, preprocessing, split) for split in ("validation", "test"))
    assert validation is not None
    threshold = validation.threshold(lose)
    share = validation.at(threshold)[1]
    if share == 0:
        run.watch.say(
            f"{run.preprocessing.size} px lose less than {lose:g} points against {size} px: nothing to ask again"
        )
        return None
    mask = frozen(run.backbone) if large.name == "frozen" else run.mask(large.name, run.mask_from)
    measured = {
        "serves": large.name if large.name == "frozen" else run.recipe.adapt,
        "validation_images": len(run.rows[1]),
        "held_out_images": len(run.held_out),
        "modes": {mode: _figures(mode, validation, test, threshold) for mode in INPUT_MODES},
    }
    run.watch.show(show(measured, _passes(run, preprocessing, small.name, large.name)))
    card = DeferralCard(
        threshold=threshold,
        lose=lose,
        share=share,
        accuracy=measured,
        preprocessing=preprocessing.to_json(),
        mask=MaskCard(
            name="dispatcher",
            start=mask.start,
            weights=run.backbone.weights.numel() - run.backbone.offset(mask.start),
            density=round(density(run.backbone, mask), 4),
        ),
    )
    return Larger(preprocessing, replace(mask, name="dispatcher"), half(large.head), card)


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


def best(run: Run, names: Sequence[str], preprocessing: Preprocessing) -> Candidate:
    """The classifier of the larger size, under the frozen backbone or a mask: that which validation images prefer."""
    return max((fitted_head(run, name, preprocessing) for name in names), key=lambda found: found.validation)


def half(head: Linear) -> Linear:
    """As a bundle stores it: float16 weights."""
    return Linear(head.weight.half(), head.bias)


def answers(run: Run, small: Candidate, large: Candidate, preprocessing: Preprocessing, split: str) -> Answers | None:
    """Of the validation or the test images; None where those have no labels."""
    part = 0 if split == "validation" else 1
    labels = (run.images if part == 0 else run.held_out).labels
    if labels is None:
        return None
    found = run.features(small.name)[part], run.features(large.name, preprocessing)[part]
    rows = run.rows[1] if part == 0 else np.arange(len(labels))
    served = [half(each.head) for each in (small, large)]
    scores = [head.scores(torch.from_numpy(features[rows])) for head, features in zip(served, found, strict=True)]
    return Answers.of(scores[0], scores[1], labels[rows])


def _figures(mode: str, validation: Answers, test: Answers | None, threshold: float) -> dict[str, float | None]:
    """Accuracy in [0, 1], and the share of the test images (without labels: validation images) that is asked again."""
    at = {"fast": 0.0, "adaptive": threshold, "full": ALWAYS}[mode]
    accuracy, again = validation.at(at)
    measured, again = (None, again) if test is None else test.at(at)
    share = 0.0 if mode == "full" else again
    return {"validation": round(accuracy, 4), "test": None if measured is None else round(measured, 4), "again": share}


@torch.inference_mode()
def _passes(run: Run, preprocessing: Preprocessing, small: str, large: str) -> float:
    """Passes of the small size that one of the larger size takes, by time; each under its mask."""
    device = run.backbone.weights.device
    masks = [None if name == "frozen" else run.mask(name, run.mask_from) for name in (small, large)]
    images = [torch.zeros(BATCH, 3, p.size, p.size, device=device) for p in (run.preprocessing, preprocessing)]
    seconds: tuple[list[float], list[float]] = [], []
    for _ in range(TIMED):  # in turns, so that a busy moment meets both
        for mask, x, spent in zip(masks, images, seconds, strict=True):
            run.executor.swap(mask)
            begin = time.perf_counter()
            float(run.executor.run(x).sum())  # a number on the host: a GPU is waited for
            spent.append(time.perf_counter() - begin)
    return median(seconds[1][1:]) / median(seconds[0][1:])
