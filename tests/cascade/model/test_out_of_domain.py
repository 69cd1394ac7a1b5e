"""The out-of-domain score, against scikit-learn's probabilistic PCA and on two real worlds."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import normalize

from cascade.bundle.format import Bundle
from cascade.model.out_of_domain import OutOfDomain, quantile_scores
from cascade.model.router import route
from tests.cascade.conftest import Seen
from training.clusters import OOD_DIM, fit_ood


@pytest.fixture(scope="module")
def ood(seen: Seen) -> OutOfDomain:
    return fit_ood(seen.train.numpy(), seen.test.numpy())


def test_raw_is_the_log_likelihood_of_scikit_learn(ood: OutOfDomain, seen: Seen) -> None:
    """Up to the constant -2 and the shift by the determinant, the same for all."""
    pca = PCA(OOD_DIM, random_state=0).fit(normalize(seen.train.numpy().astype(np.float64)))
    features = torch.cat([seen.test, seen.foreign])
    likelihood = pca.score_samples(normalize(features.numpy().astype(np.float64)))
    raw = ood.raw(features).double().numpy()
    shift = raw + 2 * likelihood
    assert np.ptp(shift) < 0.01 * np.ptp(raw), "rounding of the basis to float16, no more"
    order, expected = (np.argsort(np.argsort(v)) for v in (raw, -likelihood))
    assert np.corrcoef(order, expected)[0, 1] > 0.9999


def test_scores_are_percentiles_of_what_was_held_out(ood: OutOfDomain, seen: Seen) -> None:
    scores = ood.score(seen.test).sort().values
    torch.testing.assert_close(scores, torch.linspace(0, 1, len(scores)), rtol=0, atol=0.02)
    assert float(scores.min()) >= 0 and float(scores.max()) <= 1


def test_score_is_monotone_and_bounded(ood: OutOfDomain, seen: Seen) -> None:
    features = torch.cat([seen.train, seen.test, seen.foreign, -seen.test, torch.zeros(1, 1280), 1e6 * seen.test])
    raw, score = ood.raw(features), ood.score(features)
    assert (score.shape, score.dtype) == ((len(features),), torch.float32)
    assert bool(((score >= 0) & (score <= 1)).all())
    assert bool((score[raw.argsort()].diff() >= 0).all())
    assert len(score.unique()) > 100


@pytest.mark.parametrize(
    ("raw", "score"),
    [(-5, 0), (1, 0), (1.5, 0.125), (2, 0.25), (2.0001, 0.75), (3, 0.75 + 0.25 / 8), (10, 1), (11, 1), (1e30, 1)],
)
def test_between_and_beyond_the_quantiles(raw: float, score: float) -> None:
    quantiles = torch.tensor([[1.0, 2, 2, 2, 10]])
    assert float(quantile_scores(torch.tensor([float(raw)]), quantiles)) == pytest.approx(score, abs=1e-4)


def test_images_that_are_all_alike(ood: OutOfDomain, seen: Seen) -> None:
    """Quantiles without any distance between them still give numbers in [0, 1]."""
    flat = replace(ood, quantiles=torch.full((257,), 5.0))
    score = flat.score(seen.test)
    assert bool(((score >= 0) & (score <= 1)).all())


def test_photos_and_garments_are_told_apart(trained: Bundle, seen: Seen) -> None:
    """CIFAR-10 against Fashion-MNIST, by the cascade of a few steps that the tests train."""
    assert trained.ood is not None
    features = torch.cat([seen.test, seen.foreign])
    other = np.arange(len(features)) >= len(seen.test)
    _, confidence = route(trained.router, trained.calibration, features)
    by_score = roc_auc_score(other, trained.ood.score(features).numpy())
    by_confidence = roc_auc_score(other, 1 - confidence.numpy())
    assert by_score > 0.8
    assert by_score > by_confidence
