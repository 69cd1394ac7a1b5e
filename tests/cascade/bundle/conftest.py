"""A small bundle, in memory and on disk."""

from pathlib import Path

import pytest
from PIL import Image

from cascade.bundle.format import Bundle, write
from tests.helpers.bundle_files import whole


@pytest.fixture(scope="module")
def small(cifar: list[Image.Image]) -> Bundle:
    return whole(cifar[:48], router="prototypes")


@pytest.fixture
def written(small: Bundle, tmp_path: Path) -> Path:
    return write(small, tmp_path / "hand" / "1")
