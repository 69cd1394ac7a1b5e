"""The map of a bundle: it comes with training, and can be added later."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize
from typer.testing import CliRunner

import cascade
from cascade import Prediction
from cascade.bundle.format import read, write
from cascade.bundle.map import NO_CLUSTER
from cascade.cli.main import app
from cascade.errors import CascadeError
from cascade.model.decoding import read as read_image
from cascade.model.heads import Bank
from cascade.tsne import FEWEST
from training import maps


def test_few_rows_have_no_map() -> None:
    embeddings = normalize(torch.randn(FEWEST, 16, generator=torch.Generator().manual_seed(0))).half()
    names = tuple(map(str, range(FEWEST)))
    found = maps.fit(Bank(embeddings, names))
    assert found is not None and found.points.isfinite().all() and (found.clusters == NO_CLUSTER).all()
    assert maps.fit(Bank(embeddings[:-1], names[:-1])) is None


def test_it_comes_with_training(bundle_path: Path, cifar_folder: Path) -> None:
    bundle = read(bundle_path)
    assert bundle.map is not None
    names = bundle.banks["conditional"].names
    answers = cascade.load(bundle_path, executor="plain").predict([read_image(cifar_folder / n) for n in names])
    assert bundle.map.clusters.tolist() == [a.cluster for a in answers if isinstance(a, Prediction)]
    measured = bundle.card.accuracy["reliability"]
    assert sum(measured["labels"]["counts"]) == 60 and sum(measured["clusters"]["counts"]) == 30
    right = np.dot(measured["labels"]["counts"], measured["labels"]["right"]) / 60
    assert right == pytest.approx(bundle.card.accuracy["whitened"]["conditional"]["probe"], abs=0.15)


@pytest.mark.slow
def test_it_can_be_added_later(bundle_path: Path, cifar_folder: Path, tmp_path: Path) -> None:
    """The same as from training, up to the sample that it is measured on."""
    whole = read(bundle_path)
    assert whole.map is not None
    card = whole.card.model_copy(update={"accuracy": {"kept": 1}})
    old = write(replace(whole, map=None, card=card), tmp_path / "old" / "1")
    ran = CliRunner().invoke(app, ["map", str(old), "--out", str(tmp_path / "old" / "2")])
    assert ran.exit_code == 0 and f"wrote {tmp_path / 'old' / '2'}" in ran.output
    bare = read(tmp_path / "old" / "2")
    assert bare.map is not None and bare.map.points.equal(whole.map.points)
    assert (bare.map.clusters == NO_CLUSTER).all() and bare.card.accuracy == {"kept": 1}

    full = read(maps.add(old, tmp_path / "old" / "3", str(cifar_folder)))
    assert full.map is not None and full.map.clusters.equal(whole.map.clusters)
    measured, trained = full.card.accuracy["reliability"], whole.card.accuracy["reliability"]
    assert measured["labels"] == trained["labels"] and sum(measured["clusters"]["counts"]) == 60
    assert full.card.accuracy["kept"] == 1 and full.dispatcher.bits.equal(whole.dispatcher.bits)


def test_what_has_no_map(bundle_path: Path, tmp_path: Path) -> None:
    path = write(replace(read(bundle_path), banks={}, thumbnails=None, map=None), tmp_path / "bare" / "1")
    with pytest.raises(CascadeError, match="has no neighbor bank of 8 or more images"):
        maps.add(path, tmp_path / "bare" / "2")
