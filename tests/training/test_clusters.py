"""Routers agree with the libraries that fit them; sizes, calibration and out-of-domain score hold what they say."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import faiss
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture
from sklearn.preprocessing import normalize
from torch import Tensor

from cascade.errors import CascadeError
from cascade.model.router import Prototypes, Router
from training import clusters, experts, heads
from training.cli import Watch
from training.recipe import Recipe
from training.run import CLUSTERS, Run, resume
from training.swav import Projector

K = 4


@pytest.fixture(scope="module")
def features(cifar: list[Image.Image]) -> np.ndarray:
    """Of 300 photos: 12 x 12 gray pixels each, float32 [300, 144]."""
    photos = [np.asarray(image.convert("L").resize((12, 12)), np.float32).ravel() for image in cifar]
    return np.stack(photos) / 255


@pytest.fixture(scope="module")
def projector() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return dict(Projector(144, 32, 60).state_dict())


@pytest.fixture(scope="module")
def trained(bundle_path: Path) -> Run:
    """The finished run of the small bundle."""
    return resume(bundle_path.parents[2] / "run", Watch(None))


def whitened(features: np.ndarray) -> np.ndarray:
    """The paper's space, the long way."""
    x = normalize(features.astype(np.float64))
    pca = PCA(20).fit(x)
    return (x - pca.mean_) @ pca.components_.T / np.sqrt(pca.explained_variance_)


# The three kinds


def test_mixture_is_scikit_learns(features: np.ndarray) -> None:
    router = clusters.fit_gmm(features, K, seed=0)
    _, x = clusters._whiten(features, 0)
    np.testing.assert_allclose(np.abs(x), np.abs(whitened(features)), atol=1e-6)  # the axes' signs are free
    np.testing.assert_allclose(x.var(axis=0, ddof=1), 1)
    mixture = GaussianMixture(K, covariance_type="full", n_init=3, random_state=0).fit(x)
    got = router.probabilities(torch.from_numpy(features))
    np.testing.assert_allclose(got.numpy(), mixture.predict_proba(x), atol=1e-5)
    assert len(set(got.argmax(dim=1).tolist())) == K


def test_nearest_centroid_is_scikit_learns(features: np.ndarray) -> None:
    router = clusters.fit_centroids(features, K, seed=0)
    _, x = clusters._whiten(features, 0)
    kmeans = KMeans(K, n_init=10, random_state=0).fit(x)
    got = router.probabilities(torch.from_numpy(features))
    assert np.array_equal(got.argmax(dim=1), kmeans.predict(x))
    distance = kmeans.transform(x) ** 2
    odds = np.exp(-0.5 * (distance - distance.min(axis=1, keepdims=True)))
    np.testing.assert_allclose(got.numpy(), odds / odds.sum(axis=1, keepdims=True), atol=1e-5)


def test_prototypes_are_grouped_by_spherical_k_means_weighted_by_what_they_are_assigned(
    features: np.ndarray, projector: dict[str, Tensor]
) -> None:
    router = clusters.fit_prototypes(projector, features, K, seed=0)
    head, c = (projector[n].half().double().numpy() for n in ("head.weight", "prototypes"))
    z = normalize(features @ head.T + projector["head.bias"].half().double().numpy())
    share = np.exp(z @ c.T / 0.1)
    share /= share.sum(axis=1, keepdims=True)
    expected = np.stack([share[:, router.cluster.numpy() == k].sum(axis=1) for k in range(K)], axis=1)
    got = router.probabilities(torch.from_numpy(features))
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-3)

    # A fixed point of spherical k-means: each prototype is nearest to the weighted mean of its own cluster.
    weight = share.sum(axis=0)[:, None]
    assigned = router.cluster.numpy()
    centers = normalize(np.stack([(weight * c)[assigned == k].sum(axis=0) for k in range(K)]))
    assert np.array_equal((c @ centers.T).argmax(axis=1), assigned)
    # The weights matter, or the test could not tell whether they were given.
    plain = faiss.Kmeans(32, K, niter=50, nredo=10, spherical=True, seed=1, min_points_per_centroid=1)
    plain.train(c.astype(np.float32))
    assert not np.array_equal(plain.index.search(c.astype(np.float32), 1)[1][:, 0], assigned)


FITS: list[Callable[[np.ndarray, dict[str, Tensor]], Router]] = [
    lambda features, projector: clusters.fit_prototypes(projector, features, K, 0),
    lambda features, projector: clusters.fit_gmm(features, K, 0),
    lambda features, projector: clusters.fit_centroids(features, K, 0),
]


@pytest.mark.parametrize("fit", FITS)
def test_every_kind_gives_distributions_and_is_seeded(
    fit: Callable[[np.ndarray, dict[str, Tensor]], Router], features: np.ndarray, projector: dict[str, Tensor]
) -> None:
    x = torch.from_numpy(features)
    first, again = fit(features, projector).probabilities(x), fit(features, projector).probabilities(x)
    assert torch.equal(first, again)
    torch.testing.assert_close(first.sum(dim=1), torch.ones(300))
    assert first.shape == (300, K) and len(set(first.argmax(dim=1).tolist())) > 1


def test_more_clusters_than_prototypes_is_a_clear_error(features: np.ndarray, projector: dict[str, Tensor]) -> None:
    with pytest.raises(CascadeError, match="60 prototypes can't form 61 clusters: train with more --prototypes"):
        clusters.fit_prototypes(projector, features, 61, 0)


# Who gets which images


def test_experts_are_trained_on_the_images_that_the_shipped_router_sends_to_them(
    trained: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cascade.bundle.format import read
    from training import evaluate

    shipped = read(trained.folder.parent / "store" / "small" / "1").router
    assert shipped is not None
    features = evaluate.collect(trained).train[0]
    routed = shipped.probabilities(torch.from_numpy(features)).argmax(dim=1).numpy()
    given: list[np.ndarray] = []
    monkeypatch.setattr(experts, "fit", lambda *_, rows, **__: given.append(rows))
    experts.train(trained)
    assert len(given) == 3 and sorted(np.concatenate(given)) == list(range(240))
    for k, rows in enumerate(given):
        assert np.array_equal(rows, np.flatnonzero(routed == k))


def test_half_precision_is_rounded_before_anything_is_assigned(
    features: np.ndarray, projector: dict[str, Tensor]
) -> None:
    """So what a bundle stores gives the very same probabilities."""
    router = clusters.fit_prototypes(projector, features, K, 0)
    assert {router.head.dtype, router.bias.dtype, router.prototypes.dtype} == {torch.float16}
    full = Prototypes(
        projector["head.weight"], projector["head.bias"], projector["prototypes"], router.cluster, router.clusters
    )
    x = torch.from_numpy(features)
    assert not torch.equal(full.probabilities(x), router.probabilities(x))


@dataclass
class Said(Watch):
    """A watch that remembers its lines."""

    lines: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        self.lines.append(text)


def test_a_cluster_too_small_stops_and_a_collapse_is_said(tmp_path: Path) -> None:
    watch = Said()
    run = Run(tmp_path, Recipe("", clusters=3), watch)
    with pytest.raises(CascadeError, match="cluster 1 has 15 images, an expert needs 16: .* fewer --clusters"):
        clusters._check_sizes([100, 15, 100], run)
    clusters._check_sizes([100, 16, 100], run)
    clusters._check_sizes([1000], run)  # one cluster that was asked for is no collapse
    assert watch.lines == []
    clusters._check_sizes([1000, 16, 16], run)
    assert len(watch.lines) == 1 and "97% of the images" in watch.lines[0]
    assert "as if there were 1.2:" in watch.lines[0] and "fewer --clusters" in watch.lines[0]


def test_how_many_clusters_there_are_in_effect() -> None:
    assert clusters.effective([50, 50, 50, 50]) == pytest.approx(4)
    assert clusters.effective([70, 0, 0]) == pytest.approx(1)
    assert clusters.effective([20, 20, 0]) == pytest.approx(2)


# Calibration


def test_calibration_error_of_a_hand_example() -> None:
    """Bins of 1/15. Four answers in [0.8, 0.867) at 0.85, three right: |3 - 3.4|; two at 0.2, both right: |2 - 0.4|;
    one at 1.0, right: no gap. Their sum over the seven answers."""
    confidence = np.array([0.85, 0.85, 0.85, 0.85, 0.21, 0.21, 1.0])
    correct = np.array([1, 1, 1, 0, 1, 1, 1], float)
    assert heads.calibration_error(confidence, correct) == pytest.approx((0.4 + 1.58) / 7)
    assert heads.calibration_error(np.array([0.0, 1.0, 0.5, 0.5]), np.array([0.0, 1.0, 1.0, 0.0])) == 0


def test_confidence_rises_with_the_routers_and_is_measured_on_other_images(trained: Run) -> None:
    summary = json.loads((trained.folder / clusters.SUMMARY).read_text())
    assert summary["kind"] == "centroid" and summary["slope"] > 0
    assert 0 <= summary["calibration_error"] < 0.25
    assigned = load_file(trained.folder / CLUSTERS)["assigned"]
    shares = [round(int((assigned == k).sum()) / 240, 4) for k in range(3)]
    assert summary["shares"] == shares and min(shares) >= 16 / 240


@dataclass(frozen=True)
class Sure:
    """A router that sends everything to cluster 0, with these probabilities in order."""

    kind: ClassVar[str] = "sure"
    layout: ClassVar[dict[str, str]] = {}
    p: Tensor

    def probabilities(self, features: Tensor) -> Tensor:
        return torch.stack([self.p, 1 - self.p], dim=1)[: len(features)]


def test_platt_scaling_finds_the_rate_that_there_is(trained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """60 answers, a third sure and nine times in ten the same, the rest unsure and the same every other time."""
    p = torch.where(torch.arange(60) % 3 == 0, 0.999, 0.6)  # not in the same order in both halves
    same = torch.rand(clusters.VIEWS, 60, generator=torch.Generator().manual_seed(0)) < torch.where(p > 0.9, 0.9, 0.5)
    monkeypatch.setattr(clusters, "_view_agrees", lambda run, router, pixels, cluster, view: same[view])
    held_out = np.zeros((60, 4), np.float32)
    calibration, error, measured = clusters.calibrate(trained, Sure(p), held_out)
    confidence = calibration.confidence(Sure(p).probabilities(torch.zeros(60, 4)))
    half = same[:, ::2]
    for level in (0.999, 0.6):  # two levels, two parameters: the fit is the observed rate of the half that it saw
        mine = p[::2] == level
        assert confidence[::2][mine].mean() == pytest.approx(float(half[:, mine].float().mean()), abs=0.01)
    rest = [float(same[:, 1::2][:, p[1::2] == level].float().mean()) for level in (0.999, 0.6)]
    told = [float(confidence[1::2][p[1::2] == level].mean()) for level in (0.999, 0.6)]
    gaps = [abs(a - b) for a, b in zip(rest, told, strict=True)]
    assert error == pytest.approx(np.average(gaps, weights=[1, 2]), abs=0.01)
    full = [bin for bin, count in enumerate(measured["counts"]) if count]
    assert [measured["counts"][bin] for bin in full] == [20, 10], "the unsure ones, then the sure ones"
    assert [measured["right"][bin] for bin in full] == pytest.approx(rest[::-1], abs=1e-3)


@pytest.mark.parametrize("outcome", [True, False])
def test_one_outcome_only_gives_its_rate(outcome: bool, trained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "_view_agrees", lambda *_: torch.full((60,), outcome))
    calibration, _, _ = clusters.calibrate(trained, Sure(torch.linspace(0.6, 1, 60)), np.zeros((60, 4), np.float32))
    seen = 30 * clusters.VIEWS
    rate = ((seen if outcome else 0) + 1) / (seen + 2)
    confidence = calibration.confidence(torch.tensor([[0.9, 0.1], [0.5, 0.5]]))
    torch.testing.assert_close(confidence, torch.full((2,), rate))


# The out-of-domain score


def test_ood_score_is_the_share_of_held_out_images_that_are_less_unusual(features: np.ndarray) -> None:
    train, held_out = features[:240], torch.from_numpy(features[240:])
    ood = clusters.fit_ood(train, features[240:])
    raw = ood.raw(held_out)
    shares = torch.stack([(raw < r).float().mean() for r in raw])
    torch.testing.assert_close(ood.score(held_out), shares, atol=0.03, rtol=0)
    strange = ood.score(held_out.flip(1))  # photos upside down and mirrored
    checkers = ood.score(torch.from_numpy(np.indices((12, 12)).sum(0).ravel() % 2).float()[None])
    assert checkers.item() == 1 and strange.mean() > ood.score(held_out).mean()


def test_ood_raw_measure_is_mahalanobis_under_probabilistic_pca(features: np.ndarray) -> None:
    train, held_out = features[:240], features[240:]
    pca = PCA(64, random_state=0).fit(normalize(train.astype(np.float64)))
    offset = normalize(held_out.astype(np.float64)) - pca.mean_
    expected = np.einsum("ni,ij,nj->n", offset, pca.get_precision(), offset)
    got = clusters.fit_ood(train, held_out).raw(torch.from_numpy(held_out)).numpy()
    np.testing.assert_allclose(got, expected, rtol=0.02)


@pytest.mark.parametrize("count", [16, 40, 100])
def test_ood_of_few_images_is_finite_and_tells_them_apart(count: int, features: np.ndarray) -> None:
    ood = clusters.fit_ood(features[:count], features[count : count + 8])
    scores = ood.score(torch.from_numpy(features[count : count + 60]))
    assert bool(scores.isfinite().all()) and 0 <= scores.min() < scores.max() <= 1
