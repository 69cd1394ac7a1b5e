"""Stage 2: clusters, the router that assigns images to them, its calibration, and the out-of-domain score (paper §3.3).

python -m training.clusters --run runs/cifar
"""

from typing import Any

import faiss
import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.mixture import GaussianMixture as Mixture
from sklearn.preprocessing import normalize

from cascade.bundle.format import strip_prefix
from cascade.errors import CascadeError
from cascade.model.out_of_domain import OutOfDomain
from cascade.model.reliability import reliability
from cascade.model.router import Calibration, Centroids, GaussianMixture, Prototypes, Router, log_odds, tensors
from training import embed
from training.cli import RUN, RunFolder, stage, start
from training.data.augment import crop_flip
from training.heads import calibration_error
from training.run import CLUSTERS, FEWEST, Run, resume, write_json, write_tensors

SUMMARY = "clusters.json"
LARGEST = 0.8  # share of the images in one cluster above which the router hardly divides them
ROUTING_DIM = 20  # of the whitened PCA under mixture and centroids, the paper's
OOD_DIM, QUANTILES = 64, 257
VIEW_SCALE = (0.3, 1.0)  # area of the crops that count as another view of the same image
VIEWS = 4


def fit(run: Run) -> None:
    """Fit router, calibration and out-of-domain score on the dispatcher's features, and assign every image."""
    if (run.folder / CLUSTERS).exists():
        return
    recipe = run.recipe
    features, held_out = run.features("dispatcher")
    summary: dict[str, object] = {}
    ood = fit_ood(features, held_out[::2])
    stored = {f"ood.{n}": getattr(ood, n) for n in ("mean", "basis", "variance", "noise", "quantiles")}
    if recipe.clusters:
        router = fit_router(run, features)
        probabilities = router.probabilities(torch.from_numpy(features))
        assigned = probabilities.argmax(dim=1)
        counts = torch.bincount(assigned, minlength=recipe.clusters)
        _check_sizes(counts.tolist(), run)
        calibration, error, measured = calibrate(run, router, held_out)
        stored |= {f"router.{n}": t for n, t in tensors(router).items()} | {"assigned": assigned}
        summary = {
            "kind": router.kind,
            "shares": [round(c / len(assigned), 4) for c in counts.tolist()],
            "effective": round(effective(counts.tolist()), 4),
            "slope": calibration.slope,
            "intercept": calibration.intercept,
            "calibration_error": round(error, 4),
            "reliability": measured,
        }
    write_json(run.folder / SUMMARY, summary)
    write_tensors(run.folder / CLUSTERS, stored)  # last: this file marks the stage as done


def fit_router(run: Run, features: np.ndarray) -> Router:
    """Fit the recipe's kind of router on the dispatcher's features [N, F]."""
    recipe = run.recipe
    match recipe.router:
        case "prototypes":
            projector = strip_prefix(run.trained("dispatcher"), "objective.")
            return fit_prototypes(projector, features, recipe.clusters, recipe.seed)
        case "gmm":
            return fit_gmm(features, recipe.clusters, recipe.seed)
        case "centroid":
            return fit_centroids(features, recipe.clusters, recipe.seed)


def fit_prototypes(projector: dict[str, torch.Tensor], features: np.ndarray, clusters: int, seed: int) -> Prototypes:
    """Group SwAV's prototypes by spherical k-means (FAISS), weighted by the images assigned to each."""
    head, bias = projector["head.weight"].half(), projector["head.bias"].half()
    prototypes = torch.nn.functional.normalize(projector["prototypes"]).half()
    if clusters > len(prototypes):
        raise CascadeError(f"{len(prototypes)} prototypes can't form {clusters} clusters: train with more --prototypes")
    every = torch.arange(len(prototypes))
    # A router with one cluster per prototype gives the weight of each prototype.
    alone = Prototypes(head, bias, prototypes, every, torch.tensor([len(every)]))
    mass = alone.probabilities(torch.from_numpy(features)).sum(dim=0).numpy()
    points = prototypes.float().numpy()
    kmeans = faiss.Kmeans(
        points.shape[1],
        clusters,
        niter=50,
        nredo=10,
        spherical=True,
        seed=seed + 1,
        min_points_per_centroid=1,
    )
    kmeans.train(points, weights=mass)
    cluster = torch.from_numpy(kmeans.index.search(points, 1)[1][:, 0])
    return Prototypes(head, bias, prototypes, cluster, torch.tensor([clusters]))


def fit_gmm(features: np.ndarray, clusters: int, seed: int) -> GaussianMixture:
    """Fit the paper's router: PCA to 20 dimensions, whitened, and a full-covariance mixture (scikit-learn)."""
    pca, x = _whiten(features, seed)
    mixture = Mixture(clusters, covariance_type="full", n_init=3, random_state=seed).fit(x)
    parameters = (mixture.means_, mixture.precisions_cholesky_, mixture.weights_)
    return GaussianMixture(*_projection(pca), *(torch.from_numpy(np.ascontiguousarray(a)) for a in parameters))


def fit_centroids(features: np.ndarray, clusters: int, seed: int) -> Centroids:
    """Fit k-means in the same whitened space (scikit-learn)."""
    pca, x = _whiten(features, seed)
    means = KMeans(clusters, n_init=10, random_state=seed).fit(x).cluster_centers_
    return Centroids(*_projection(pca), torch.from_numpy(means))


def fit_ood(features: np.ndarray, held_out: np.ndarray) -> OutOfDomain:
    """Fit probabilistic PCA on the training features (scikit-learn), and percentiles on held-out ones."""
    dim = min(OOD_DIM, min(features.shape) // 2)  # with few images, keep enough dimensions to estimate the noise
    pca = PCA(dim, random_state=0).fit(normalize(features.astype(np.float64)))
    tables = (pca.mean_, pca.components_.T, pca.explained_variance_, np.array([pca.noise_variance_]))
    mean, basis, variance, noise = (torch.from_numpy(np.ascontiguousarray(t)).float() for t in tables)
    fitted = OutOfDomain(mean, basis.half(), variance, noise, torch.zeros(2))
    raw = fitted.raw(torch.from_numpy(held_out))
    quantiles = torch.quantile(raw, torch.linspace(0, 1, QUANTILES))
    return OutOfDomain(mean, basis.half(), variance, noise, quantiles)


def calibrate(run: Run, router: Router, held_out: np.ndarray) -> tuple[Calibration, float, dict[str, Any]]:
    """Fit Platt scaling on every other held-out image; expected calibration error and reliability are of the rest.

    The predicted event is that another view of the image (crop and flip) is routed to the same cluster.
    """
    probabilities = router.probabilities(torch.from_numpy(held_out))
    odds = log_odds(probabilities.max(dim=1).values)
    pixels = torch.from_numpy(np.array(run.inputs("test")))
    same = torch.stack([_view_agrees(run, router, pixels, probabilities.argmax(dim=1), v) for v in range(VIEWS)])
    fit_half, test_half = slice(0, None, 2), slice(1, None, 2)
    x, y = odds[fit_half].repeat(VIEWS, 1).flatten(), same[:, fit_half].flatten()
    if bool(y.all()) or not bool(y.any()):  # one outcome only: its rate, by Laplace's rule
        rate = (float(y.sum()) + 1) / (len(y) + 2)
        calibration = Calibration(0.0, float(np.log(rate / (1 - rate))))
    else:
        fit = LogisticRegression(C=np.inf).fit(x.numpy()[:, None], y.numpy())
        calibration = Calibration(float(fit.coef_[0, 0]), float(fit.intercept_[0]))
    confidence = calibration.confidence(probabilities[test_half]).numpy()
    right = same[:, test_half].float().mean(dim=0).numpy()
    return calibration, calibration_error(confidence, right), reliability(confidence, right)


def _view_agrees(run: Run, router: Router, pixels: torch.Tensor, cluster: torch.Tensor, view: int) -> torch.Tensor:
    """Whether a random view of each image is routed to the same cluster as the image, bool [N]."""
    p, generator = run.preprocessing, torch.Generator().manual_seed(run.recipe.seed * VIEWS + view)
    views = (
        crop_flip(pixels[i : i + 128], p.size, VIEW_SCALE, generator, p.mean, p.std) for i in range(0, len(pixels), 128)
    )
    features = embed.blocks(run.executor, [run.dispatcher], views)[0]
    return router.probabilities(torch.from_numpy(features)).argmax(dim=1) == cluster


def _whiten(features: np.ndarray, seed: int) -> tuple[PCA, np.ndarray]:
    """L2-normalize, apply PCA and scale to unit variance (scikit-learn's reg_covar is absolute, so scale matters)."""
    x = normalize(features.astype(np.float64))
    pca = PCA(min(ROUTING_DIM, min(x.shape) - 1), whiten=True, svd_solver="covariance_eigh", random_state=seed).fit(x)
    return pca, pca.transform(x)


def _projection(pca: PCA) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and whitened basis, so that ``(x - mean) @ basis`` equals the fitted PCA."""
    basis = (pca.components_ / np.sqrt(pca.explained_variance_)[:, None]).T
    return torch.from_numpy(pca.mean_), torch.from_numpy(np.ascontiguousarray(basis))


def _check_sizes(counts: list[int], run: Run) -> None:
    """Raise if a cluster can't fill a batch, warn if the clusters collapse."""
    smallest = min(range(len(counts)), key=counts.__getitem__)
    if counts[smallest] < FEWEST:
        raise CascadeError(
            f"cluster {smallest} has {counts[smallest]} images, an expert needs {FEWEST}:"
            " train with fewer --clusters, more images, or another --router"
        )
    if len(counts) > 1 and max(counts) > LARGEST * sum(counts):
        run.watch.say(
            f"[yellow]warning:[/] one cluster holds {max(counts) / sum(counts):.0%} of the images: {counts}; it is as"
            f" if there were {effective(counts):.1f}: train the dispatcher longer, or take fewer --clusters or another"
            " --router"
        )


def effective(counts: list[int]) -> float:
    """Effective number of clusters: exp of the entropy of their counts."""
    share = np.array(counts) / sum(counts)
    return float(np.exp(-sum(p * np.log(p) for p in share if p)))


def command(run: RunFolder = RUN) -> None:
    """Fit the clusters of a run whose dispatcher is trained."""
    with stage() as watch:
        fit(resume(run, watch))


if __name__ == "__main__":
    start(command)
