"""Features of real images under the small cascade's dispatcher, for whoever routes or scores them; a bad folder."""

import os
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from shutil import copy
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import cascade
from cascade.bundle.format import Bundle, read
from tests.conftest import sheet
from tests.helpers.photos import PHOTOS


@pytest.fixture(scope="session", autouse=True)
def indices_in_old_interpreters() -> None:
    """Triton 3.6's interpreter makes integers of arrays with one element, which numpy refuses since 2.4."""
    if tuple(map(int, version("triton").split(".")[:2])) >= (3, 9):
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def mended(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = mended


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


@pytest.fixture(scope="module")
def engine(bundle_path: Path) -> cascade.Engine:
    """The small trained cascade's."""
    return cascade.load(bundle_path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The ten photographs, to any depth, and whatever goes wrong in real folders (``photos.BAD``)."""
    folder = tmp_path / "images"
    (folder / "nested" / "deeper").mkdir(parents=True)
    for i, photo in enumerate(PHOTOS):
        copy(photo, (folder, folder / "nested", folder / "nested" / "deeper")[i % 3])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpeg").write_text("no image")
    (folder / "cut.png").write_bytes(PHOTOS[0].read_bytes()[:200])
    Image.open(PHOTOS[0]).save(folder / "other.gif")
    (folder / "broken.png").symlink_to(folder / "gone.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    os.mkfifo(folder / "pipe.webp")
    (folder / "notes.md").write_text("not searched for")
    return folder
