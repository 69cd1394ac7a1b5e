"""Fit the fusion of blocks to one embedding (paper §3.4; method.md §3): center, PCA, whiten; folded."""

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from cascade.errors import CascadeError
from cascade.model.fusion import Fusion, Mode, fold
from training.recipe import Recipe


@dataclass(frozen=True)
class Fitted:
    """The fusion of a mode, and the embeddings of the training and the held-out images, float32 [N, dim] each."""

    fusion: Fusion
    train: Tensor
    test: Tensor


def slots(mode: Mode, blocks: np.ndarray, assigned: np.ndarray, layout: str) -> np.ndarray:
    """The blocks that a mode fuses, float32 [slots, N, F].

    Args:
        blocks: features of dispatcher and experts, float32 [K + 1, N, F].
        assigned: routed cluster of each image, int64 [N].
        layout: of the conditional mode: beside the dispatcher's block ``one`` slot for all experts, or one for each,
            ``padded`` with zeros (the paper's); or ``routed``, the expert's block alone.
    """
    if mode == "dispatcher":
        return blocks[:1]
    if mode == "unconditional":
        return blocks
    routed = blocks[assigned + 1, np.arange(blocks.shape[1])]
    if layout == "routed":
        return routed[None]
    if layout == "one":
        return np.stack([blocks[0], routed])
    padded = np.zeros_like(blocks)
    padded[0] = blocks[0]
    padded[assigned + 1, np.arange(blocks.shape[1])] = routed
    return padded


def fit(parts: np.ndarray, dim: int, whiten: str, seed: int) -> Fusion:
    """Fit a folded PCA of concatenated blocks, float32 [slots, N, F], to ``dim`` components.

    ``whiten`` "scale" divides each component by its standard deviation, "eigenvalue" by its variance (the
    wording of the paper's text), "none" leaves it.
    """
    mean, basis = principal(np.concatenate(list(parts), axis=1), dim, whiten, seed)
    fusion = fold(torch.from_numpy(mean), torch.from_numpy(basis), len(parts))
    if not fusion.weight.isfinite().all():
        raise CascadeError(f"--whiten {whiten} leaves the range of half precision in {dim} components: lower --dim")
    return fusion


def principal(x: np.ndarray, dim: int, whiten: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean [F] and basis [F, dim] of features [N, F], so that ``(x - mean) @ basis`` is whitened as ``fit`` says."""
    if dim > min(x.shape):
        raise CascadeError(f"{len(x)} images can't give {dim} components: lower --dim to at most {min(x.shape)}")
    pca = PCA(dim, random_state=seed).fit(x)
    variance = np.maximum(pca.explained_variance_, 1e-12)
    scale = {"scale": np.sqrt(variance), "eigenvalue": variance, "none": np.ones_like(variance)}[whiten]
    # Similar or too few images span fewer dimensions: the rest is rounding noise, which whitening would amplify.
    spanned = variance > 1e-8 * variance[0]
    return pca.mean_, np.ascontiguousarray((pca.components_ * spanned[:, None] / scale[:, None]).T)


def beside_nothing(routed: Fusion) -> Fusion:
    """A fusion of the expert's block alone as one of two slots: nothing is added for the dispatcher's block."""
    return Fusion(torch.cat([torch.zeros_like(routed.weight), routed.weight]), routed.bias)


def embed(fusion: Fusion, parts: np.ndarray) -> Tensor:
    """Apply a fitted fusion to blocks float32 [slots, N, F]: float32 [N, dim]."""
    out = fusion.bias.repeat(parts.shape[1], 1)
    for weight, block in zip(fusion.weight, parts, strict=True):
        out += torch.from_numpy(np.ascontiguousarray(block)) @ weight.float()
    return out


def dimension(recipe: Recipe, features: int, images: int) -> int:
    """The recipe's ``dim``, or the backbone's own width; never more than the number of images."""
    return min(recipe.dim or features, features, images - 1)
