"""Give a bundle its map: t-SNE of the neighbor bank's embeddings.

``add`` also measures how sure the bundle is, if it gets the images of its training.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cascade.bundle.bundle import Bundle
from cascade.bundle.format import read, write
from cascade.bundle.map import NO_CLUSTER, Map
from cascade.engine.engine import Engine
from cascade.engine.pixels import Source
from cascade.engine.results import Options, Prediction
from cascade.errors import CascadeError
from cascade.model.heads import Bank
from cascade.model.reliability import reliability
from cascade.tsne import FEWEST, places
from training import embed
from training.clusters import VIEW_SCALE, VIEWS
from training.data import dataset
from training.data.augment import crop_flip
from training.data.dataset import Images

HELD_OUT = 2000  # most images to measure by
BATCH = 128


def fit(bank: Bank, assigned: Tensor | None = None) -> Map | None:
    """The map of a bank; None if it has too few rows.

    Args:
        assigned: the cluster of each row, int64 [rows]; None without a router.
    """
    rows = len(bank.names)
    if rows < FEWEST:
        return None
    own = torch.full((rows,), NO_CLUSTER) if assigned is None else assigned
    return Map(torch.from_numpy(places(bank.embeddings.float().numpy())).half(), own.to(torch.int16))


def add(path: Path, out: Path, data: str | None = None, weights: Path | None = None) -> Path:
    """Copy a bundle to ``out`` (``<name>/<version>``), with a map.

    Args:
        data: images that it was trained on, a folder or a published data set: they tell the cluster of each row, and
            the held-out ones how sure the bundle is. None: neither is known.
        weights: a checkpoint that replaces the bundle's own weight source.

    Raises:
        CascadeError: the bundle has no neighbor bank or too few images in it, one of them is not in ``data``, or
            ``out`` exists.
    """
    bundle = read(path)
    bank = bundle.banks.get(bundle.card.mode)
    if bank is None or len(bank.names) < FEWEST:
        raise CascadeError(f"{path} has no neighbor bank of {FEWEST} or more images: there is nothing to map")
    assigned, accuracy = None, bundle.card.accuracy
    if data is not None:
        engine = Engine(executor="plain", weights=weights)
        engine.add(bundle)
        if bundle.experts:
            assigned = _clusters(_answers(engine, _opened(rows_of(bank.names, dataset.load(data, "train")))))
        if measured := measure(engine, bundle, dataset.load(data, "test", HELD_OUT)):
            accuracy = accuracy | {"reliability": measured}
    card = bundle.card.model_copy(update={"accuracy": accuracy})
    return write(replace(bundle, map=fit(bank, assigned), card=card), out)


def rows_of(names: Sequence[str], images: Images) -> Images:
    """The images of a bank's rows, among others. Raises CascadeError if one is missing."""
    index = {" ".join(name.split()): i for i, name in enumerate(images.names)}
    if missing := [name for name in names if name not in index]:
        raise CascadeError(
            f"{len(missing)} of {len(names)} images are not there, {missing[0]} for one: give the data of its training"
        )
    return images.take([index[name] for name in names])


def measure(engine: Engine, bundle: Bundle, images: Images) -> dict[str, Any]:
    """The reliability of a bundle's labels and clusters on held-out images; what it does not have is left out."""
    measured, answers = {}, _answers(engine, _opened(images))
    if bundle.linear and images.labels is not None and set(images.classes) <= set(bundle.card.classes):
        right = [a.labels[0].name == images.classes[label] for a, label in zip(answers, images.labels, strict=True)]
        measured["labels"] = reliability(np.array([a.labels[0].score for a in answers]), np.array(right, float))
    if bundle.experts:
        p, own = bundle.preprocessing, _clusters(answers)
        pixels = torch.from_numpy(embed.cropped(_opened(images), p))
        same = np.zeros(len(images))
        for view in range(VIEWS):
            generator = torch.Generator().manual_seed(view)
            batches = (
                crop_flip(pixels[i : i + BATCH], p.size, VIEW_SCALE, generator, p.mean, p.std)
                for i in range(0, len(pixels), BATCH)
            )
            same += (_clusters(_answers(engine, (x for batch in batches for x in batch))) == own).numpy() / VIEWS
        measured["clusters"] = reliability(np.array([a.confidence for a in answers]), same)
    return measured


def _opened(images: Images) -> Iterator[Image.Image]:
    return map(images.open, range(len(images)))


def _clusters(answers: Sequence[Prediction]) -> Tensor:
    return torch.tensor([answer.cluster for answer in answers])


def _answers(engine: Engine, images: Iterator[Source]) -> list[Prediction]:
    """Answers of an engine with one bundle, in batches."""
    answers: list[Prediction] = []
    while batch := [*islice(images, BATCH)]:
        for answer in engine.predict(batch, Options(labels=1, neighbors=0), on_error="raise"):
            assert answer.ok
            answers.append(answer)
    return answers
