"""The routers, against the libraries that fit them and on the features of real images."""

import faiss
import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture as Mixture
from sklearn.preprocessing import normalize
from torch import Tensor

from cascade.model.router import Calibration, Prototypes, Router, log_odds, route, tensors
from tests.cascade.conftest import Seen
from training.clusters import fit_centroids, fit_gmm, fit_prototypes

K, SEED = 3, 0


@pytest.fixture(scope="module")
def projector(seen: Seen) -> dict[str, Tensor]:
    """A SwAV head and prototypes as a training leaves them: drawn, and spread over the images as SwAV wants it."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 1280, generator=generator)
    return {
        "head.weight": weight,
        "head.bias": -weight @ seen.train.mean(dim=0),
        "prototypes": torch.randn(40, 32, generator=generator),
    }


@pytest.fixture(scope="module", params=["prototypes", "gmm", "centroid"])
def router(request: pytest.FixtureRequest, seen: Seen, projector: dict[str, Tensor]) -> Router:
    match request.param:
        case "prototypes":
            return fit_prototypes(projector, seen.train.numpy(), K, SEED)
        case "gmm":
            return fit_gmm(seen.train.numpy(), K, SEED)
    return fit_centroids(seen.train.numpy(), K, SEED)


def whitened(seen: Seen) -> tuple[np.ndarray, np.ndarray]:
    """Training and held-out features as scikit-learn's own PCA whitens them."""
    pca = PCA(20, whiten=True, svd_solver="covariance_eigh").fit(normalize(seen.train.numpy().astype(np.float64)))
    train, test = (pca.transform(normalize(x.numpy().astype(np.float64))) for x in (seen.train, seen.test))
    return train, test


def test_probabilities_are_probabilities(router: Router, seen: Seen) -> None:
    """On the images that it was fitted on, on others, and on ones that lie far from everything."""
    for features in (seen.train, seen.test, seen.foreign, -seen.test, 1000 * seen.test, torch.zeros(1, 1280)):
        p = router.probabilities(features)
        assert (p.shape, p.dtype) == ((len(features), K), torch.float32)
        torch.testing.assert_close(p.sum(dim=1), torch.ones(len(p)), rtol=0, atol=1e-5)
        assert bool(((p >= 0) & (p <= 1 + 1e-6)).all())
    assert len(router.probabilities(seen.train).argmax(dim=1).unique()) > 1


def test_each_image_for_itself(router: Router, seen: Seen) -> None:
    together = router.probabilities(seen.test)
    alone = torch.cat([router.probabilities(x[None]) for x in seen.test])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_mixture_agrees_with_scikit_learn(seen: Seen) -> None:
    train, test = whitened(seen)
    mixture = Mixture(K, covariance_type="full", n_init=3, random_state=SEED).fit(train)
    router = fit_gmm(seen.train.numpy(), K, SEED)
    for x, features in ((train, seen.train), (test, seen.test)):
        found = router.probabilities(features).numpy()
        np.testing.assert_allclose(found, mixture.predict_proba(x), atol=1e-5)
        np.testing.assert_array_equal(found.argmax(axis=1), mixture.predict(x))


def test_centroids_agree_with_scikit_learn(seen: Seen) -> None:
    train, test = whitened(seen)
    kmeans = KMeans(K, n_init=10, random_state=SEED).fit(train)
    p = fit_centroids(seen.train.numpy(), K, SEED).probabilities(seen.test).numpy()
    np.testing.assert_array_equal(p.argmax(axis=1), kmeans.predict(test))
    weight = np.exp(-0.5 * kmeans.transform(test) ** 2)
    np.testing.assert_allclose(p, weight / weight.sum(axis=1, keepdims=True), atol=1e-5)


def test_prototypes_are_grouped_as_faiss_groups_them(seen: Seen, projector: dict[str, Tensor]) -> None:
    router = fit_prototypes(projector, seen.train.numpy(), K, SEED)
    assert len(router.cluster) == 40 and int(router.clusters) == K
    # Spherical k-means, by hand: each prototype points most nearly where its cluster's weighted mean does.
    points, cluster = router.prototypes.float(), router.cluster
    mass = soft_assignment(router, seen.train).sum(dim=0)
    means = torch.stack([(points * mass[:, None])[cluster == k].sum(dim=0) for k in range(K)])
    index = faiss.IndexFlatIP(32)
    index.add(normalize(means.numpy()))
    nearest = index.search(points.numpy(), 1)[1][:, 0]
    assert (nearest == cluster.numpy()).mean() >= 0.95, "k-means stops at the last round but one"


def soft_assignment(router: Prototypes, features: Tensor) -> Tensor:
    """softmax(z . c / 0.1) over all prototypes, in float64."""
    z = features.double() @ router.head.double().T + router.bias.double()
    z = z / z.norm(dim=1, keepdim=True)
    return (z @ router.prototypes.double().T / 0.1).softmax(dim=1)


def test_prototypes_sum_over_their_cluster(seen: Seen, projector: dict[str, Tensor]) -> None:
    router = fit_prototypes(projector, seen.train.numpy(), K, SEED)
    share = soft_assignment(router, seen.test)
    want = torch.stack([share[:, router.cluster == k].sum(dim=1) for k in range(K)], dim=1)
    torch.testing.assert_close(router.probabilities(seen.test).double(), want, rtol=1e-4, atol=1e-5)


def test_a_cluster_without_prototypes_is_never_chosen(projector: dict[str, Tensor]) -> None:
    head, prototypes = projector["head.weight"].half(), projector["prototypes"].half()
    router = Prototypes(head, torch.zeros(32).half(), prototypes, torch.zeros(40, dtype=torch.int64), torch.tensor([3]))
    assert router.probabilities(torch.ones(2, 1280)).allclose(torch.tensor([1.0, 0.0, 0.0]))


def test_tensors_are_those_of_the_layout(router: Router) -> None:
    assert tensors(router).keys() == router.layout.keys()
    for name, tensor in tensors(router).items():
        dtype, *axes = router.layout[name].split()
        assert (str(tensor.dtype), tensor.dim()) == (f"torch.{dtype}", len(axes))


def test_confidence_rises_with_the_winning_probability() -> None:
    p = torch.linspace(0.34, 1, 200)
    table = torch.stack([p, (1 - p) / 2, (1 - p) / 2], dim=1)
    for calibration in (Calibration(), Calibration(0.4, -0.2), Calibration(3, 1)):
        confidence = calibration.confidence(table)
        assert bool((confidence.diff() > 0).all() if calibration.slope < 1 else (confidence.diff() >= 0).all())
        assert bool(((confidence > 0) & (confidence <= 1)).all()) and bool(confidence.isfinite().all())
    torch.testing.assert_close(Calibration().confidence(table), p, rtol=1e-4, atol=1e-5)
    by_hand = 1 / (1 + np.exp(-(0.4 * np.log(0.8 / 0.2) - 0.2)))
    assert float(Calibration(0.4, -0.2).confidence(torch.tensor([[0.2, 0.8]]))) == pytest.approx(by_hand, abs=1e-6)


def test_log_odds_are_finite() -> None:
    assert bool(log_odds(torch.tensor([0.0, 0.5, 1.0])).isfinite().all())
    assert float(log_odds(torch.tensor([0.5]))) == 0


def test_route(router: Router, seen: Seen) -> None:
    calibration = Calibration(0.7, 0.1)
    cluster, confidence = route(router, calibration, seen.test)
    p = router.probabilities(seen.test)
    assert cluster.equal(p.argmax(dim=1))
    assert confidence.equal(calibration.confidence(p))
    cluster, confidence = route(None, calibration, seen.test)
    assert cluster.tolist() == [0] * len(seen.test)
    assert confidence.tolist() == [1.0] * len(seen.test)
