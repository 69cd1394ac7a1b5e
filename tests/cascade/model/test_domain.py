"""Domains: nearest prototype in the metric of the mean scatter, on real images of two data sets."""

import numpy as np
import pytest
import torch
from torch import Tensor

from cascade.bundle.format import Bundle
from cascade.model.domain import MAX_WIDTH, Domain, Domains, calibrated_temperature, pooled
from tests.conftest import sheet
from tests.helpers.bundles import handmade
from tests.helpers.domains import activations
from training import domains


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return handmade(sheet("cifar10")[:40], experts=0)


@pytest.fixture(scope="module")
def features(bundle: Bundle) -> dict[str, Tensor]:
    return {name: activations(bundle, sheet(name), 2) for name in ("cifar10", "fashion_mnist")}


@pytest.fixture(scope="module")
def fitted(features: dict[str, Tensor]) -> list[Domain]:
    return [domains.fit(x[:200]) for x in features.values()]


def test_sends_held_out_images_to_their_domain(features: dict[str, Tensor], fitted: list[Domain]) -> None:
    together = Domains.of(fitted)
    for n, x in enumerate(features.values()):  # a random network: a trained one does better
        assert (together.scores(x[200:]).argmax(dim=1) == n).float().mean() > 0.88


def test_scores_are_mahalanobis_distances(features: dict[str, Tensor], fitted: list[Domain]) -> None:
    """Against numpy: half the squared distance to the nearest prototype, but for a constant of each image."""
    together, x = Domains.of(fitted), features["cifar10"][200:220]
    metric = together.metric.numpy().astype(np.float64)
    for n, domain in enumerate(fitted):
        gaps = x.numpy()[:, None].astype(np.float64) - domain.prototypes.float().numpy()[None]
        want = np.einsum("npd,de,npe->np", gaps, metric, gaps).min(axis=1)
        got = together.distance(x, together.scores(x))[:, n]
        np.testing.assert_allclose(got.numpy(), want, rtol=2e-3, atol=1e-2)


def test_the_metric_is_the_inverse_of_the_mean_scatter(fitted: list[Domain]) -> None:
    width = fitted[0].prototypes.shape[1]
    full = np.zeros((width, width))
    full[np.tril_indices(width)] = np.mean([domain.scatter.double().numpy() for domain in fitted], axis=0)
    full = full + full.T - np.diag(full.diagonal())
    full += 0.05 * full.diagonal().mean() * np.eye(width)
    np.testing.assert_allclose(Domains.of(fitted).metric.numpy() @ full, np.eye(width), atol=1e-3)


def test_a_foreign_image_is_strange(features: dict[str, Tensor], fitted: list[Domain]) -> None:
    alone, own, foreign = Domains.of(fitted[1:]), features["fashion_mnist"][200:], features["cifar10"]
    near, far = (alone.strangeness(alone.distance(x, alone.scores(x)))[:, 0] for x in (own, foreign))
    assert abs(float(near.median())) < 1.5 and float(far.median()) > 5
    assert (near[:, None] < far[None]).float().mean() > 0.95, "the AUROC of unknown images"


def test_each_bundle_is_fitted_alone(features: dict[str, Tensor], fitted: list[Domain]) -> None:
    again = domains.fit(features["cifar10"][:200])
    for name in Domain.layout:
        assert torch.equal(getattr(again, name), getattr(fitted[0], name))


@pytest.mark.parametrize("images", [3, 20])
def test_few_images_have_a_domain(features: dict[str, Tensor], fitted: list[Domain], images: int) -> None:
    domain = domains.fit(features["cifar10"][:images])
    assert len(domain.samples) >= 2
    scores = Domains.of([domain, *fitted]).scores(features["cifar10"][:5])
    assert scores.shape == (5, 3) and scores.isfinite().all()


def test_temperature_makes_the_truth_likely() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 3, generator=generator)
    truth = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]
    assert 3.5 < calibrated_temperature(logits * 4, truth) < 4.6


def test_pools_maps_and_tokens() -> None:
    maps = torch.rand(2, 5, 3, 3) + 0.1
    tokens = maps.flatten(2).transpose(1, 2)
    torch.testing.assert_close(pooled(maps), pooled(tokens))
    torch.testing.assert_close(pooled(maps).norm(dim=1), torch.full((2,), 5**0.5))


def test_wide_activations_are_projected(generator: np.random.Generator) -> None:
    x = torch.from_numpy(generator.normal(size=(50, 768, 2, 2))).float()
    projected, whole = pooled(x), torch.nn.functional.normalize(x.mean(dim=(2, 3))) * 768**0.5
    assert projected.shape == (50, MAX_WIDTH)
    ratio = torch.pdist(projected) / torch.pdist(whole)
    assert 0.8 < float(ratio.mean()) < 1.2, "distances stay what they were, about"
