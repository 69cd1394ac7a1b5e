"""Label accuracy of a finished bundle on other images: ``cascade evaluate``."""

import logging
from pathlib import Path

import numpy as np
from rich.table import Table

from cascade.bundle.format import read
from cascade.engine.engine import Engine
from cascade.engine.results import INPUT_MODES, ItemError, Options, Prediction
from cascade.errors import CascadeError
from cascade.progress import track
from training.data import dataset

BATCH = 64
log = logging.getLogger(__name__)


def of_bundle(path: Path, source: str, limit: int | None = None, weights: Path | None = None) -> Table:
    """Measure head and nearest neighbors in every mode, on the held-out split of ``source``.

    Raises:
        CascadeError: the images have no class folders, or classes that the bundle does not know.
    """
    bundle = read(path)
    images = dataset.load(source, "test", limit)
    if images.labels is None or not set(images.classes) <= set(bundle.card.classes):
        known = ", ".join(bundle.card.classes) or "none, it was trained without class folders"
        raise CascadeError(f"{source} must have class folders that the bundle knows: {known}")
    engine = Engine(weights=weights)
    engine.add(bundle)
    truth = np.array(images.classes)[images.labels]
    table = Table("mode", "head", "nearest neighbors", title=f"accuracy in % on {len(images)} images")
    for mode in (*bundle.fusions, *(INPUT_MODES if bundle.larger is not None else ())):
        head, near, failed = [], [], 0
        for begin in track(range(0, len(images), BATCH), f"{mode:<14}", -(-len(images) // BATCH)):
            batch = [images.open(i) for i in range(begin, min(begin + BATCH, len(images)))]
            answers = engine.predict(batch, Options(mode=mode, labels=1))
            for answer, label in zip(answers, truth[begin : begin + BATCH], strict=True):
                if isinstance(answer, ItemError):
                    failed += 1
                    continue
                head += [answer.labels[0].name == label] if answer.labels else []
                near += [_vote(answer) == label] if answer.neighbors else []
        if failed:
            log.warning("%s: %d of %d images could not be predicted and are not counted", mode, failed, len(images))
        table.add_row(mode, *(f"{100 * float(np.mean(right)):.1f}" if right else "-" for right in (head, near)))
    return table


def _vote(answer: Prediction) -> str | None:
    """The label with the highest similarity-weighted vote of the neighbors, as in the k-NN evaluation."""
    votes: dict[str | None, float] = {}
    for n in answer.neighbors:
        votes[n.label] = votes.get(n.label, 0.0) + float(np.exp(n.similarity / 0.1))
    return max(votes, key=votes.__getitem__)
