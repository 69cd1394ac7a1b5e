"""Heads: labels as scikit-learn gives them, neighbors as brute force finds them."""

import sys

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import normalize

from cascade.errors import CascadeError
from cascade.model.heads import Bank, Linear
from tests.cascade.conftest import Seen


@pytest.fixture(scope="module")
def bank(seen: Seen) -> Bank:
    """240 real images, by their features."""
    rows = normalize(seen.train).half()
    return Bank(rows, tuple(f"image-{i}.png" for i in range(len(rows))), tuple(str(i % 10) for i in range(len(rows))))


def test_linear_is_softmax_regression(seen: Seen) -> None:
    x = normalize(seen.train).numpy()
    labels = np.arange(len(x)) % 3
    fitted = LogisticRegression(C=100, max_iter=200).fit(x, labels)
    head = Linear(torch.from_numpy(fitted.coef_).float(), torch.from_numpy(fitted.intercept_).float())
    test = normalize(seen.test)
    scores = head.scores(test)
    assert scores.shape == (len(test), 3)
    np.testing.assert_allclose(scores.numpy(), fitted.predict_proba(test.numpy()), atol=1e-5)
    np.testing.assert_allclose(scores.sum(dim=1).numpy(), 1, atol=1e-6)


def test_linear_survives_large_logits() -> None:
    head = Linear(torch.tensor([[1e4], [-1e4]]), torch.zeros(2))
    assert head.scores(torch.tensor([[1.0]])).tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("k", [1, 5, 240])
def test_nearest_is_brute_force(bank: Bank, seen: Seen, k: int) -> None:
    similarities, rows = bank.nearest(3 * seen.test, k)
    table = normalize(seen.test).double() @ bank.embeddings.double().T
    assert similarities.shape == rows.shape == (len(seen.test), k)
    want = table.sort(dim=1, descending=True).values[:, :k].numpy()
    np.testing.assert_allclose(similarities, want, atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(table.numpy(), rows, axis=1), similarities, atol=1e-5)
    assert all(len(set(row)) == k for row in rows.tolist())


def test_an_image_of_the_bank_finds_itself(bank: Bank, seen: Seen) -> None:
    similarities, rows = bank.nearest(seen.train, 1)
    assert (rows[:, 0] == np.arange(len(rows))).mean() > 0.95, "two images may be alike to float16"
    assert similarities.min() > 0.999


def test_no_more_neighbors_than_rows(seen: Seen) -> None:
    few = Bank(normalize(seen.train[:3]).half(), ("a", "b", "c"))
    similarities, rows = few.nearest(seen.test[:2], 5)
    assert rows.shape == (2, 3) and rows.min() >= 0
    assert bool((np.diff(similarities, axis=1) <= 0).all())


def test_bytes_count_the_index(bank: Bank) -> None:
    rows = len(bank.names) * 1280
    assert bank.bytes() == 2 * rows + 4 * rows
    assert bank.index.ntotal == len(bank.names)


def test_without_faiss_one_line_names_the_extra(bank: Bank, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    fresh = Bank(bank.embeddings, bank.names)
    with pytest.raises(CascadeError) as error:
        fresh.nearest(seen.test, 1)
    assert str(error.value) == "faiss is not installed: pip install 'cascade-vision[cpu]' (or [gpu], on a CUDA machine)"
