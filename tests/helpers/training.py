"""Short trainings of a tiny backbone."""

from pathlib import Path

from PIL import Image

from cascade.bundle.format import Bundle
from cascade.engine.engine import Engine
from cascade.engine.results import Prediction
from tests.helpers.answers import answers
from training import pipeline
from training.cli import Watch
from training.recipe import Recipe
from training.run import begin

OPTIONS = {
    "backbone": "test_efficientnet",
    "source": "random:0",
    "size": 32,
    "mask_from": "blocks.3",
    "steps": 6,
    "expert_steps": 4,
    "batch": 32,
    "lr": 0.3,
    "local_crops": 0,
    "prototypes": 40,
    "objective": "swav",
    "clusters": 3,
    "router": "centroid",
    "dim": 16,
    "bank": 50,
    "neighbors": 5,
}


def recipe(folder: Path, **changes: object) -> Recipe:
    return Recipe(str(folder), **OPTIONS | changes)  # type: ignore[arg-type]


class Recorder(Watch):
    """Keeps what a person would be told."""

    def __init__(self) -> None:
        super().__init__(None)
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def train(root: Path, recipe: Recipe, **more: bool) -> Path:
    return pipeline.train(begin(root / "run", recipe, Watch(None)), root / "store" / "small" / "1", **more)


def predict(bundle: Bundle, images: list[Image.Image], mode: str | None = None) -> list[Prediction]:
    engine = Engine()
    engine.add(bundle)
    return answers(engine, images, mode=mode)


def content(bundle: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(bundle.iterdir())}


def flat(cifar: list[Image.Image], folder: Path, count: int) -> Path:
    """Photos without class folders."""
    folder.mkdir(parents=True)
    for i, image in enumerate(cifar[:count]):
        image.save(folder / f"{i:04d}.png")
    return folder
