"""Linear discriminants from stored statistics: equal to scikit-learn's, and to those of all images at once."""

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor

from cascade.model.discriminant import Discriminant


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    """Four classes in eight dimensions of very different scales, float32 [400, 8], int64 [400]."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 4
    mixing = torch.randn(8, 8, generator=generator) * torch.logspace(-2, 2, 8)
    means = 2 * torch.randn(4, 8, generator=generator)
    return (means[labels] + torch.randn(400, 8, generator=generator)) @ mixing + 5, labels


def answers(kept: Discriminant, x: Tensor) -> Tensor:
    head = kept.head()
    return torch.nn.functional.linear(x, head.weight, head.bias)


def test_the_head_is_that_of_scikit_learn(data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    kept = Discriminant.of(x, y, 4, ridge=1e-6)
    theirs = LinearDiscriminantAnalysis(solver="lsqr", priors=[0.25] * 4).fit(x.double().numpy(), y.numpy())
    ours = answers(kept, x).softmax(dim=1)
    np.testing.assert_allclose(ours, theirs.predict_proba(x.double().numpy()), atol=0.02)
    assert (ours.argmax(dim=1) == y).float().mean() > 0.9


def test_images_that_come_later_count_as_if_they_had_been_there(data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    first, known, new = y < 3, (y < 3) & (torch.arange(400) < 300), y == 3
    whole = Discriminant.of(x, y, 4)
    grown = Discriminant.of(x[known], y[known], 3).add(x[first & ~known], y[first & ~known], 3).add(x[new], y[new], 4)
    assert grown.counts.tolist() == whole.counts.tolist()
    torch.testing.assert_close(grown.means, whole.means, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grown.deviation, whole.deviation, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(answers(grown, x), answers(whole, x), rtol=0.02, atol=0.2)


def test_a_removed_class_is_never_the_answer_and_the_others_keep_their_order(data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    kept = Discriminant.of(x, y, 4)
    rest = [0, 1, 3]
    logits, less = answers(kept, x)[:, rest], answers(kept.keep(rest), x)
    torch.testing.assert_close(
        less - less.mean(dim=1, keepdim=True), logits - logits.mean(dim=1, keepdim=True), rtol=1e-3, atol=1e-3
    )


def test_a_class_without_images_is_never_the_answer_and_constant_features_do_no_harm() -> None:
    x = torch.randn(60, 3, generator=torch.Generator().manual_seed(1))
    x[:, 2] = 7.0
    kept = Discriminant.of(x, torch.arange(60) % 2, 3, temperature=2.0)
    scores = answers(kept, x)
    assert scores.isfinite().all() and set(scores.argmax(dim=1).tolist()) <= {0, 1}
    sharp = answers(Discriminant.of(x, torch.arange(60) % 2, 3), x)
    torch.testing.assert_close(scores[:, :2], sharp[:, :2] / 2, rtol=1e-4, atol=1e-4)
