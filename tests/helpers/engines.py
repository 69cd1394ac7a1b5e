"""Engines for tests."""

from cascade import Engine
from cascade.bundle.format import Bundle
from cascade.engine.executors.selection import Kind

EXACT: tuple[Kind, ...] = ("plain", "folded", "onnx")
"""The executors that compute in float32."""


def engine_of(*bundles: Bundle, budget: int | None = None, executor: Kind = "plain") -> Engine:
    engine = Engine(budget, executor=executor)
    for bundle in bundles:
        engine.add(bundle)
    return engine


def one_mask(*bundles: Bundle, executor: Kind = "plain") -> int:
    """Bytes of the largest mask's weights."""
    engine = engine_of(*bundles, executor=executor)
    return max(engine.executor(bundle).size(mask) for bundle in bundles for mask in bundle.masks)
