"""Cascade: one resident backbone, adapted per image by 1-bit masks over its weights.

    import cascade
    engine = cascade.load("model_store/paper/1")
    for answer in engine.predict(["cat.jpg", "ship.png"]):
        print(answer.labels if answer.ok else answer.error)

Names are loaded on first use, so that ``import cascade`` (and ``cascade --help``) does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cascade.errors import CascadeError

if TYPE_CHECKING:
    from cascade.bundle.format import Bundle
    from cascade.client import Client
    from cascade.engine.engine import Engine, load
    from cascade.engine.results import ItemError, Options, Prediction

__version__ = "0.2.0"
__all__ = ["Bundle", "CascadeError", "Client", "Engine", "ItemError", "Options", "Prediction", "load"]

_HOMES = {
    "Bundle": "cascade.bundle.format",
    "Client": "cascade.client",
    "Engine": "cascade.engine.engine",
    "ItemError": "cascade.engine.results",
    "Options": "cascade.engine.results",
    "Prediction": "cascade.engine.results",
    "load": "cascade.engine.engine",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'cascade' has no attribute {name!r}")
