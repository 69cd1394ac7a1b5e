"""The committed store: its size, and the paper's cascade is what the documentation says of it."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

import cascade
from cascade import Engine, Options, Prediction
from cascade.bundle.format import Bundle, read
from cascade.model.decoding import decode
from handlers.demo_images import NOBODY, samples
from handlers.demo_report import Answered
from tests.conftest import sheet
from tests.helpers.paths import DATA

pytestmark = pytest.mark.slow

STORE = Path(__file__).parents[1] / "model_store"
PAPER = STORE / "paper" / "1"


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return read(PAPER)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return cascade.load(PAPER)


def predict(engine: Engine, images: list[Image.Image], **wishes: object) -> list[Prediction]:
    answers = engine.predict(images, Options(**wishes))  # type: ignore[arg-type]
    return [a for a in answers if isinstance(a, Prediction)]


def test_at_most_12_mb_together() -> None:
    assert sum(f.stat().st_size for f in STORE.rglob("*") if f.is_file()) <= 12_000_000


@pytest.mark.parametrize("path", sorted(STORE.glob("*/*")), ids=lambda path: path.parent.name)
def test_each_has_pictures_and_names_no_machine(path: Path) -> None:
    found = read(path)
    assert found.thumbnails is not None and len(found.thumbnails) >= 100
    assert found.map is not None and len(found.map.points) == len(found.thumbnails)
    assert (found.map.clusters >= 0).all() == bool(found.experts)
    assert ("labels" in found.card.accuracy.get("reliability", {})) == bool(found.linear)
    assert path == PAPER or found.domain is not None  # the paper's cascade is asked by name only
    text = (path / "cascade.json").read_text()
    assert "/root" not in text and "/home" not in text and "/tmp" not in text


def test_better_than_the_frozen_backbone(bundle: Bundle) -> None:
    found = bundle.card.accuracy
    assert found["seeds"] == 3 and found["held_out_images"] >= 2_000
    mean, deviation = found["gain_over_frozen"][bundle.card.mode]["knn"]
    assert mean >= 0.02 and mean > 2 * deviation


def test_card_has_every_control(bundle: Bundle) -> None:
    methods = {"frozen backbone", "learning-rate zero", "dispatcher", "equal-steps dispatcher"}
    for part in ("whitened", "plain"):
        assert set(bundle.card.accuracy[part]) == methods | {"conditional", "unconditional"}
        assert all(set(scores) == {"knn", "probe"} for scores in bundle.card.accuracy[part].values())


def test_clusters_and_experts_are_real(bundle: Bundle) -> None:
    assert bundle.card.router is not None
    assert sum(share >= 0.05 for share in bundle.card.router.shares) >= 3
    assert all(mask.differs_from_dispatcher >= 0.005 for mask in bundle.card.masks[1:])


def test_neighbors_have_pictures(bundle: Bundle) -> None:
    pictures = bundle.thumbnails
    assert pictures is not None and len(pictures) == len(bundle.banks["conditional"].names) == 500
    assert {decode(pictures[row]).size for row in range(0, 500, 25)} == {(32, 32)}
    assert len({pictures[row] for row in range(500)}) > 495


def test_out_of_domain_score_separates_data_sets(bundle: Bundle) -> None:
    found = bundle.card.accuracy["ood_auroc"]["fashion-mnist"]
    assert found["ood"] >= 0.85 and found["ood"] > found["one_minus_confidence"]


def test_out_of_domain_score_on_committed_images(engine: Engine, cifar: list[Image.Image]) -> None:
    own = predict(engine, cifar, mode="dispatcher")
    strangers = predict(engine, sheet("fashion_mnist"), mode="dispatcher")
    truth = np.repeat([0, 1], [len(own), len(strangers)])
    score = roc_auc_score(truth, [a.ood for a in own + strangers])
    doubt = roc_auc_score(truth, [1 - a.confidence for a in own + strangers])
    assert score >= 0.85 and score > doubt


def test_labels_on_committed_images(engine: Engine, cifar: list[Image.Image]) -> None:
    """300 held-out images: the head must be within sampling error of what the card says."""
    about = json.loads((DATA / "cifar10.json").read_text())
    truth = [about["names"][label] for label in about["labels"]]
    answers = predict(engine, cifar, labels=1)
    right = np.mean([a.labels[0].name == t for a, t in zip(answers, truth, strict=True)])
    claimed = engine.find("paper").card.accuracy["whitened"]["conditional"]["probe"][0]  # type: ignore[union-attr]
    assert right == pytest.approx(claimed, abs=3 * (claimed * (1 - claimed) / len(truth)) ** 0.5)


def test_customers_answer_their_images() -> None:
    """Without a bundle's name: nine of ten labels are right."""
    engine = Engine()
    for path in sorted(STORE.glob("*/1")):
        engine.add(read(path))
    asked = [sample for sample in samples(counted=100) if sample.bundle is None]
    answers = engine.predict([sample.content for sample in asked], Options())
    found = [
        Answered(sample, answer if isinstance(answer, Prediction) else None, (0.0, 0.0))
        for sample, answer in zip(asked, answers, strict=True)
    ]
    owned = [answered for answered in found if answered.sample.customer not in (None, NOBODY)]
    assert np.mean([a.answer is not None and a.answer.bundle == a.sample.customer for a in owned]) >= 0.97
    assert np.mean([answered.right for answered in owned]) >= 0.9
    assert all(answered.answer is None for answered in found if answered not in owned)
