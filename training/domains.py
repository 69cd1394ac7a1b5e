"""Fit the domain of a bundle: prototypes of its images under the plain backbone, for dispatch between bundles."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from cascade.bundle.format import check, write
from cascade.bundle.format import read as load_bundle
from cascade.bundle.schema import DomainCard
from cascade.engine.executors.plain import PlainExecutor
from cascade.engine.weight_cache import WeightCache
from cascade.errors import CascadeError
from cascade.model import backbone as backbones
from cascade.model.backbone import Backbone
from cascade.model.decoding import read
from cascade.model.domain import Domain, pooled
from cascade.model.preprocessing import Preprocessing
from training import embed
from training.run import Run

PROTOTYPES, SAMPLES, IMAGES, LEAST = 16, 64, 4000, 10
MOST = 128  # prototypes, and samples, of a merged domain


def stage_of(backbone: Backbone) -> int:
    """The stage before which the domains of a backbone are fitted: the middle one, the same for all its bundles."""
    return (len(backbone.stages) + 1) // 2 if len(backbone.stages) > 1 else 0


def fit(features: Tensor, seed: int = 0) -> Domain:
    """Fit a domain to pooled activations float32 [N, D] of a bundle's images; at most a fifth of them is held out."""
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    held_out = min(SAMPLES, max(2, len(features) // 5))
    samples, rest = features[order[:held_out]], features[order[held_out:]]
    clusters = min(PROTOTYPES, max(1, len(rest) // 8))
    fitted = KMeans(clusters, n_init=3, random_state=seed).fit(rest.numpy())
    prototypes = torch.from_numpy(fitted.cluster_centers_).float()
    around = (rest - prototypes[torch.from_numpy(fitted.labels_).long()]).double()
    scatter = around.T @ around / max(1, len(rest) - clusters)
    rows, columns = torch.tril_indices(len(scatter), len(scatter))
    return Domain(prototypes.half(), scatter[rows, columns].half(), samples.half())


def merge(one: Domain, other: Domain, share: float, seed: int = 0) -> Domain:
    """Merge the domains of two sets of images; ``share``, in (0, 1), is the second set's share of all images."""
    prototypes = torch.cat([one.prototypes, other.prototypes])
    if len(prototypes) > MOST:
        fitted = KMeans(MOST, n_init=1, random_state=seed).fit(prototypes.float().numpy())
        prototypes = torch.from_numpy(fitted.cluster_centers_).half()
    scatter = torch.lerp(one.scatter.float(), other.scatter.float(), share).half()
    samples = torch.cat([one.samples, other.samples])
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))[:MOST]
    return Domain(prototypes, scatter, samples[order.sort().values])


def features(executor: PlainExecutor, pixels: np.ndarray, preprocessing: Preprocessing, stage: int) -> Tensor:
    """Pooled activations float32 [N, D] of images uint8 [N, 3, S, S] before a stage of the plain backbone."""
    executor.swap(None)
    device = executor.backbone.weights.device
    batches = embed.normalized(pixels, preprocessing)
    return torch.cat([pooled(executor.run(x.to(device), 0, stage) if stage else x.to(device)).cpu() for x in batches])


def of_run(run: Run) -> tuple[Domain, DomainCard]:
    """Fit the domain of a run's training images, at most ``IMAGES``."""
    rows = np.sort(np.random.default_rng(run.recipe.seed).permutation(len(run.images))[:IMAGES])
    stage = stage_of(run.backbone)
    activations = features(run.executor, run.inputs("train")[rows], run.preprocessing, stage)
    return fit(activations, run.recipe.seed), DomainCard(stage=stage)


def add(path: Path, images: Sequence[Path], out: Path, weights: Path | None = None) -> Path:
    """Copy a bundle to ``out`` (``<name>/<version>``), with the domain of these image files.

    Args:
        weights: a checkpoint that replaces the bundle's own weight source.

    Raises:
        CascadeError: the bundle or an image can't be read, there are too few images, or ``out`` exists.
    """
    bundle = load_bundle(path)
    backbone = backbones.load(bundle.card.backbone.name, bundle.card.backbone.source, weights)
    check(bundle, backbone)
    domain, card = of_files(PlainExecutor(backbone, WeightCache(2**34)), images, bundle.preprocessing)
    return write(replace(bundle, domain=domain, card=bundle.card.model_copy(update={"domain": card})), out)


def of_files(executor: PlainExecutor, paths: Sequence[Path], preprocessing: Preprocessing) -> tuple[Domain, DomainCard]:
    """Fit the domain of image files, at most ``IMAGES``."""
    if len(paths) < LEAST:
        raise CascadeError(f"{len(paths)} images are too few to tell a domain from others: give {LEAST} or more")
    order = np.random.default_rng(0).permutation(len(paths))[:IMAGES]
    pixels = embed.cropped((read(paths[i]) for i in order), preprocessing)
    stage = stage_of(executor.backbone)
    return fit(features(executor, pixels, preprocessing, stage)), DomainCard(stage=stage)
