"""Fusion: which blocks a mode takes, and centering, PCA and whitening folded into one projection."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from cascade.errors import CascadeError
from training import evaluate, fusion
from training.cli import Watch
from training.recipe import Recipe
from training.run import resume


@pytest.fixture(scope="module")
def features(bundle_path: Path) -> evaluate.Features:
    """Of 240 training and 60 held-out photos under a real dispatcher and three experts."""
    return evaluate.collect(resume(bundle_path.parents[2] / "run", Watch(None)))


def test_slots_hold_what_the_mode_says(features: evaluate.Features) -> None:
    blocks, assigned = features.train, features.assigned
    assert np.array_equal(fusion.slots("dispatcher", blocks, assigned, "one"), blocks[:1])
    assert np.array_equal(fusion.slots("unconditional", blocks, assigned, "padded"), blocks)
    one, padded = (fusion.slots("conditional", blocks, assigned, layout) for layout in ("one", "padded"))
    assert one.shape == (2, 240, 1280) and padded.shape == (4, 240, 1280)
    for i, k in enumerate(assigned):
        assert np.array_equal(one[:, i], blocks[[0, k + 1], i])
        for slot in range(1, 4):
            assert np.array_equal(padded[slot, i], blocks[slot, i] if slot == k + 1 else np.zeros(1280))


def test_scale_gives_unit_variance(features: evaluate.Features) -> None:
    parts = fusion.slots("conditional", features.train, features.assigned, "one")
    embedded = fusion.embed(fusion.fit(parts, 32, "scale", 0), parts)
    torch.testing.assert_close(embedded.mean(dim=0), torch.zeros(32), atol=2e-3, rtol=0)
    torch.testing.assert_close(torch.cov(embedded.T), torch.eye(32), atol=2e-2, rtol=0)


def test_options_differ_by_the_scale_alone(features: evaluate.Features) -> None:
    """``none`` keeps PCA's own variances, ``scale`` divides by their root, ``eigenvalue`` by themselves."""
    parts = features.train
    plain, scaled, divided = (
        fusion.embed(fusion.fit(parts, 16, whiten, 0), parts) for whiten in ("none", "scale", "eigenvalue")
    )
    variance = plain.var(dim=0)
    expected = PCA(16, random_state=0).fit(np.concatenate(list(parts), axis=1)).explained_variance_
    np.testing.assert_allclose(variance.numpy(), expected, rtol=5e-3)
    torch.testing.assert_close(scaled, plain / variance.sqrt(), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(divided / divided.std(dim=0), scaled, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(divided.var(dim=0), 1 / variance, rtol=2e-2, atol=0)


def test_folded_equals_scikit_learn_on_images_that_were_not_fitted(features: evaluate.Features) -> None:
    train, test = features.slots("unconditional", "one")
    pca = PCA(24, whiten=True, random_state=0).fit(np.concatenate(list(train), axis=1))
    expected = pca.transform(np.concatenate(list(test), axis=1))
    np.testing.assert_allclose(fusion.embed(fusion.fit(train, 24, "scale", 0), test), expected, rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("whiten", ["scale", "eigenvalue", "none"])
def test_few_or_equal_images_are_not_blown_up(features: evaluate.Features, whiten: str) -> None:
    """20 images, 10 of them twice: they span 9 dimensions, the others are rounding."""
    parts = np.concatenate([features.train[:1, :10]] * 2, axis=1)
    dim = fusion.dimension(Recipe(""), 1280, 20)
    assert dim == 19
    projection = fusion.fit(parts, dim, whiten, 0)
    assert bool(projection.weight.isfinite().all()) and bool(projection.bias.isfinite().all())
    embedded = fusion.embed(projection, parts)
    assert bool((embedded[:, 9:] == 0).all()) and bool((embedded[:, :9].std(dim=0) > 0).all())


def test_dimension_is_what_the_images_and_the_backbone_allow() -> None:
    recipe = Recipe("")
    assert fusion.dimension(recipe, 1280, 5000) == recipe.dim
    assert fusion.dimension(replace(recipe, dim=0), 1280, 5000) == 1280
    assert fusion.dimension(recipe, 64, 5000) == 64
    assert fusion.dimension(recipe, 1280, 100) == 99


def test_a_scale_beyond_half_precision_is_a_clear_error(features: evaluate.Features) -> None:
    with pytest.raises(CascadeError, match="--whiten eigenvalue leaves the range of half precision in 8 components"):
        fusion.fit(features.train[:1] * 1e-4, 8, "eigenvalue", 0)


def test_more_components_than_images_is_a_clear_error(features: evaluate.Features) -> None:
    with pytest.raises(CascadeError, match="10 images can't give 32 components: lower --dim to at most 10"):
        fusion.fit(features.train[:, :10], 32, "scale", 0)
