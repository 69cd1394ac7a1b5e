"""The baseline of every training with labels: the frozen backbone with a well-fitted linear head.

It takes seconds on stored features and costs nothing to serve. A mask is kept only if it beats this head.
"""

from dataclasses import dataclass

import numpy as np

from cascade.bundle.format import strip_prefix
from cascade.errors import CascadeError
from cascade.model.heads import Linear
from cascade.model.preprocessing import Preprocessing
from training import heads
from training.run import Run


@dataclass(frozen=True)
class Candidate:
    """A classifier that a bundle could serve, with features to measure it by.

    Attributes:
        name: ``frozen`` or the name of the mask.
        head: calibrated on the validation images.
        validation, test: accuracy in [0, 1], the latter NaN without labels.
        calibration_error: expected calibration error on the test images.
        temperature: divisor of the logits.
        loss: cross-entropy on the validation images, in nats.
    """

    name: str
    head: Linear
    validation: float
    test: float
    calibration_error: float
    temperature: float
    loss: float = float("nan")

    def beats(self, other: "Candidate") -> bool:
        """Whether it answers more validation images correctly.

        If as many, which happens where they resemble the training images, more test images; without those, whether it
        is surer of the right classes.
        """
        if self.validation != other.validation:
            return self.validation > other.validation
        if self.test != other.test and not np.isnan(self.test + other.test):
            return self.test > other.test
        return self.loss < other.loss


def frozen_head(run: Run) -> Candidate:
    """The first rung: a head fitted to the frozen backbone's features."""
    return fitted_head(run, "frozen")


def fitted_head(run: Run, name: str, preprocessing: Preprocessing | None = None) -> Candidate:
    """Fit logistic regression on the features of ``name``, with its penalty chosen by cross-validation.

    Args:
        name: a mask trained in this run, or ``frozen``.
        preprocessing: to use instead of the run's.
    """
    labels = run.images.labels
    assert labels is not None
    rows = run.rows[0]
    features = run.features(name, preprocessing)[0]
    fitted = heads.fit(
        features[rows],
        labels[rows],
        len(run.images.classes),
        balanced=run.recipe.class_weights,
        seed=run.recipe.seed,
    )
    return candidate(run, name, fitted.head, preprocessing)


def trained_head(run: Run, name: str) -> Candidate:
    """The head that was trained with a mask."""
    own = strip_prefix(run.trained(name), "objective.")
    return candidate(run, name, Linear(own["weight"], own["bias"]))


def candidate(run: Run, name: str, head: Linear, preprocessing: Preprocessing | None = None) -> Candidate:
    """Calibrate a head on the validation images and measure it on the test images, on the features of ``name``.

    Args:
        preprocessing: to use instead of the run's.
    """
    return candidate_of(run, name, head, *run.features(name, preprocessing))


def candidate_of(run: Run, name: str, head: Linear, train: np.ndarray, test: np.ndarray) -> Candidate:
    """The same for features float32 [N, F] of the training and the test images."""
    labels, truth = run.images.labels, run.held_out.labels
    assert labels is not None
    validation = run.rows[1]
    head, temperature = heads.calibrated(head, train[validation], labels[validation])
    score = heads.accuracy(head, train[validation], labels[validation]) if len(validation) else float("nan")
    measured = error = float("nan")
    if truth is not None:
        measured = heads.accuracy(head, test, truth)
        error = heads.calibration_error_of(head, test, truth)
    loss = heads.loss(head, train[validation], labels[validation]) if len(validation) else float("nan")
    return Candidate(name, head, score, measured, error, temperature, loss)


def check_labels(run: Run) -> None:
    """Warn about class folders that are hard to learn from: rare classes, imbalance, images in several classes."""
    images = run.images
    if images.labels is None:
        raise CascadeError(f"{run.recipe.data} has no class folders: omit --labels")
    counts = np.bincount(images.labels, minlength=len(images.classes))
    rare = [images.classes[i] for i in np.flatnonzero(counts == 1)]
    if rare:
        names = ", ".join(rare[:5]) + (f" and {len(rare) - 5} more" if len(rare) > 5 else "")
        run.watch.warn(f"{len(rare)} of {len(counts)} classes have one training image ({names}): add images to them")
    if absent := [images.classes[i] for i in np.flatnonzero(counts == 0)]:
        run.watch.warn(f"no training images in {', '.join(absent[:5])}: they will never be an answer")
    present = counts[counts > 0]
    if present.max() > IMBALANCED * present.min() and not run.recipe.class_weights:
        run.watch.warn(
            f"classes have {present.min()} to {present.max()} images:"
            " add --class-weights if rare classes matter as much"
        )
    label_of: dict[str, int] = {}
    several = sum(
        label_of.setdefault(d, label) != label for d, label in zip(images.digests, images.labels.tolist(), strict=True)
    )
    if several:
        run.watch.warn(
            f"{several} images are in several class folders; each image has one class here: a model with several labels"
            " for one image needs one training for each label"
        )


IMBALANCED = 10  # times as many images in one class as in another
