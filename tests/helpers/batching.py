"""An engine that waits for a sign before each pass."""

import threading
from collections.abc import Sequence
from concurrent.futures import Future

from PIL import Image

from cascade import Engine, Options
from cascade.engine.batcher import Answer, Batcher
from cascade.engine.items import AnyItem, PassAnswer


class Held(Engine):
    """Runs a pass when told to, and keeps a list of (bundle, images) for each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.go = threading.Semaphore(0), threading.Semaphore(0)
        self.passes: list[list[str]] = []

    def run_pass(self, items: Sequence[AnyItem]) -> list[PassAnswer]:
        self.passes.append([item.name or "" for item in items])
        self.entered.release()
        assert self.go.acquire(timeout=30)
        return super().run_pass(items)


def busy(batcher: Batcher, image: Image.Image, bundle: str = "c") -> "Future[Answer]":
    """The engine is in a pass when this returns, and stays there until it is told to go on."""
    future = batcher.submit(image, Options(bundle))
    assert batcher.engine.entered.acquire(timeout=30)  # type: ignore[attr-defined]
    return future
