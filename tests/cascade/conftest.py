"""Features of real images under the small cascade's dispatcher, for whoever routes or scores them."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

import cascade
from cascade.bundle import Bundle, read
from tests.conftest import sheet


@dataclass(frozen=True)
class Seen:
    """Dispatcher features, float32 [N, 1280]: of the trained ones, the held-out ones, and of another world."""

    train: Tensor
    test: Tensor
    foreign: Tensor


@pytest.fixture(scope="session")
def trained(bundle_path: Path) -> Bundle:
    """The small trained cascade."""
    return read(bundle_path)


@pytest.fixture(scope="session")
def seen(trained: Bundle, cifar: list[Image.Image]) -> Seen:
    engine = cascade.Engine()
    engine.add(trained)
    executor = engine.executor(trained)
    transform = trained.preprocessing.transform()
    executor.swap(trained.dispatcher)
    images = [*cifar, *sheet("fashion_mnist")]
    with torch.inference_mode():
        batches = torch.stack([transform(i) for i in images]).split(100)
        features = torch.cat([executor.run(x) for x in batches]).clone()
    held_out = torch.arange(300) % 5 == 4  # as the fixture cifar_folder splits them
    return Seen(features[:300][~held_out], features[:300][held_out], features[300:])
