"""t-SNE: similar embeddings are close, also those placed by their neighbors; the same embeddings, the same places."""

import numpy as np
import pytest

from cascade.tsne import FEWEST, places


def groups(rows: int, dim: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """L2-normalized embeddings of three groups that are far from one another, and the group of each."""
    generator = np.random.default_rng(0)
    owner = np.arange(rows) % 3
    points = 4 * np.eye(dim)[owner] + generator.normal(size=(rows, dim)) / 2
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32), owner


@pytest.mark.parametrize("most", [150, 40])
def test_groups_stay_together(most: int) -> None:
    """Also where most rows are placed by their neighbors alone."""
    embeddings, owner = groups(150)
    points = places(embeddings, most)
    assert points.shape == (150, 2) and points.min() == 0 and points.max() == 1
    nearest = np.linalg.norm(points[:, None] - points, axis=2) + np.eye(150)
    assert (owner[nearest.argmin(axis=1)] == owner).mean() > 0.95
    assert np.array_equal(points, places(embeddings, most))


def test_equal_embeddings_share_a_place() -> None:
    points = places(np.ones((FEWEST, 4), np.float32) / 2)
    assert points.shape == (FEWEST, 2) and (points == 0.5).all()


def test_the_fewest_rows_have_places() -> None:
    assert np.isfinite(places(groups(FEWEST)[0])).all()
