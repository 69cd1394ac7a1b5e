"""A map of embeddings: t-SNE (van der Maaten & Hinton 2008), for bundles and for reports of batch jobs."""

import numpy as np

from cascade.extras import library

PERPLEXITY = 30.0
PLACED = 2000  # most rows that t-SNE places; the others lie among the nearest of those
NEAREST = 3
FEWEST = 8  # rows, for a map


def places(embeddings: np.ndarray, most: int = PLACED, seed: int = 0) -> np.ndarray:
    """Places float32 [N, 2] in [0, 1] of L2-normalized embeddings [N, dim]; the same for the same embeddings.

    Args:
        embeddings: at least FEWEST rows.
        most: rows that t-SNE places.

    Raises:
        ExtraError: scikit-learn is not installed.
    """
    manifold, threadpoolctl = library("sklearn.manifold"), library("threadpoolctl")
    if not np.ptp(embeddings, axis=0).any():  # t-SNE divides by their spread
        return np.full((len(embeddings), 2), 0.5, np.float32)
    chosen = np.sort(np.random.default_rng(seed).permutation(len(embeddings))[:most])
    perplexity = min(PERPLEXITY, (len(chosen) - 1) / 3)
    tsne = manifold.TSNE(perplexity=perplexity, init="pca", random_state=seed, n_jobs=1)
    with threadpoolctl.threadpool_limits(1):
        placed = tsne.fit_transform(embeddings[chosen])
        similarity = embeddings @ embeddings[chosen].T
    nearest = np.argsort(-similarity, axis=1)[:, :NEAREST]
    points = placed[nearest].mean(axis=1)
    points[chosen] = placed
    low, high = points.min(axis=0), points.max(axis=0)
    return np.asarray((points - low) / np.maximum(high - low, 1e-12), np.float32)
