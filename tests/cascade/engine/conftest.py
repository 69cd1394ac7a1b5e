"""Two bundles over one backbone, and images of two domains."""

import pytest
from PIL import Image

from cascade.bundle.format import Bundle
from tests.conftest import sheet
from tests.helpers.bundles import handmade


@pytest.fixture(scope="module")
def pair(cifar: list[Image.Image]) -> tuple[Bundle, Bundle]:
    """Two unlike bundles over one backbone, with one first stage."""
    a = handmade(cifar[:40], name="a", mask_from=2, expert_from=3, norms=True)
    b = handmade(cifar[:40], name="b", mask_from=2, experts=3, router="gmm", slots="padded", seed=1)
    return a, b


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    return sheet("cifar10")


@pytest.fixture(scope="module")
def clothes() -> list[Image.Image]:
    return sheet("fashion_mnist")
