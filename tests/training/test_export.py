"""What a bundle is packed from: heads, banks, masks and card of a real run."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import normalize

from cascade.bundle.format import Bundle, read
from cascade.model import masks
from cascade.model.heads import Linear
from training import evaluate, export, fusion, heads
from training.checkpoint import DONE
from training.cli import Watch
from training.run import Run, resume


@pytest.fixture(scope="module")
def run(bundle_path: Path) -> Run:
    return resume(bundle_path.parents[2] / "run", Watch(None))


@pytest.fixture(scope="module")
def bundle(bundle_path: Path) -> Bundle:
    return read(bundle_path)


@pytest.fixture(scope="module")
def features(run: Run) -> evaluate.Features:
    return evaluate.collect(run)


@pytest.fixture(scope="module")
def embeddings(run: Run, features: evaluate.Features) -> torch.Tensor:
    """Of the training images in the conditional mode, float32 [240, 32]."""
    return evaluate.fusions(run, features)["conditional"].train


def test_the_head_is_the_probe_with_its_scaling_folded_in(run: Run, embeddings: torch.Tensor) -> None:
    labels = run.images.labels
    assert labels is not None
    fitted = heads.fit(embeddings.numpy(), labels, len(run.images.classes))
    scaled = ((embeddings - embeddings.mean(dim=0)) / (embeddings - embeddings.mean(dim=0)).std()).numpy()
    reference = LogisticRegression(C=1 / fitted.penalty, max_iter=300, tol=1e-3).fit(scaled, labels)
    np.testing.assert_allclose(fitted.head.scores(embeddings).numpy(), reference.predict_proba(scaled), atol=1e-3)


def test_two_classes_give_two_rows(embeddings: torch.Tensor) -> None:
    labels = (np.arange(240) % 3 == 0).astype(np.int64)
    fitted = heads.fit(embeddings.numpy(), labels, 2)
    scaled = ((embeddings - embeddings.mean(dim=0)) / (embeddings - embeddings.mean(dim=0)).std()).numpy()
    reference = LogisticRegression(C=1 / fitted.penalty, max_iter=300, tol=1e-3).fit(scaled, labels)
    assert fitted.head.weight.shape == (2, 32)
    np.testing.assert_allclose(fitted.head.scores(embeddings).numpy(), reference.predict_proba(scaled), atol=1e-3)


@pytest.mark.parametrize("missing", [[0], [4, 9], list(range(1, 9))])
def test_a_class_without_training_images_keeps_its_place_and_is_never_the_answer(
    missing: list[int], run: Run, embeddings: torch.Tensor
) -> None:
    labels, classes = run.images.labels, run.images.classes
    assert labels is not None
    rows = ~np.isin(labels, missing)
    head = heads.fit(embeddings[rows].numpy(), labels[rows], len(classes)).head
    scores = head.scores(embeddings[rows])
    assert scores.shape[1] == len(classes) == 10
    assert bool((scores[:, missing] == 0).all())
    assert (scores.argmax(dim=1).numpy() == labels[rows]).mean() > 0.5, "the others keep their names"


def test_the_shipped_head_and_bank_know_the_images_by_their_names(
    bundle: Bundle, run: Run, features: evaluate.Features
) -> None:
    names = list(run.images.names)
    for mode in bundle.fusions:
        parts = features.slots(mode, run.recipe.slots)[0]
        embedded = fusion.embed(bundle.fusions[mode], parts)
        bank = bundle.banks[mode]
        rows = [names.index(name) for name in bank.names]
        assert len(set(rows)) == run.recipe.bank == 100
        torch.testing.assert_close(bank.embeddings.float(), normalize(embedded[rows]), atol=2e-3, rtol=0)
        assert all(name.split("/")[1] == label for name, label in zip(bank.names, bank.labels, strict=True))
        assert bundle.card.classes == run.images.classes
        right = bundle.linear[mode].scores(embedded).argmax(dim=1).numpy() == run.images.labels
        assert right.mean() > 0.5
    assert len({bank.names for bank in bundle.banks.values()}) == 1


def test_masks_are_the_scores_above_the_threshold(bundle: Bundle, run: Run) -> None:
    for mask, folder in zip(bundle.masks, ["dispatcher", "expert-0", "expert-1", "expert-2"], strict=True):
        assert mask.name == folder
        done = load_file(run.folder / folder / DONE)
        n = run.backbone.weights.numel() - run.backbone.offset(mask.start)
        for segment, bits in masks.split(run.backbone, mask.start, masks.unpack(mask.bits, n)):
            assert torch.equal(bits, done[f"scores.{segment.parameter}"].flatten() > 0)
        card = next(m for m in bundle.card.masks if m.name == folder)
        assert card.weights == n and card.density == round(masks.density(run.backbone, mask), 4)


def test_the_card_says_what_it_was_trained_on_and_no_path(bundle: Bundle, run: Run, bundle_path: Path) -> None:
    training = bundle.card.training
    assert training["data"] == Path(run.recipe.data).name and training["images"] == 240
    assert training["data_fingerprint"] == run.images.fingerprint()
    assert training["recipe"]["steps"] == 24 and "data" not in training["recipe"]
    assert set(bundle.card.accuracy["whitened"]) >= {"frozen backbone", "dispatcher", "conditional", "unconditional"}
    text = (bundle_path / "cascade.json").read_text()
    assert str(run.folder) not in text and str(Path(run.recipe.data).parent) not in text


def test_no_bank_where_none_is_wanted(run: Run, embeddings: torch.Tensor) -> None:
    without = Run(run.folder, replace(run.recipe, bank=0), run.watch)
    assert export._banks(without, {"dispatcher": embeddings}) == {}


def test_a_head_is_plain_tensors() -> None:
    head = Linear(torch.eye(2), torch.zeros(2))
    torch.testing.assert_close(head.scores(torch.tensor([[1.0, 1.0]])), torch.tensor([[0.5, 0.5]]))
