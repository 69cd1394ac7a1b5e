"""What tests ask of a registry, its log and its metrics."""

import logging
from pathlib import Path

import pytest
from PIL import Image
from prometheus_client import REGISTRY

from cascade import Engine, ItemError, Options
from cascade.engine.registry import Registry


def flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 16
    file.write_bytes(raw)


def states(registry: Registry) -> dict[str, str]:
    return {f"{s.name}/{s.version}": s.state for s in registry.states()}


def ask(engine: Engine, image: Image.Image, **wish: str) -> str:
    """The version that answers, or the kind of the error."""
    (answer,) = engine.predict([image], Options(**wish))  # type: ignore[arg-type]
    return answer.kind if isinstance(answer, ItemError) else answer.version


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [r.getMessage() for r in caplog.records if r.name == "cascade.engine.registry" and r.levelno > logging.INFO]
    caplog.clear()
    return found


def gauge(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(f"cascade_{name}", labels)
