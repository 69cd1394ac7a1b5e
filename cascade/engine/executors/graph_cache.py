"""Optimized ONNX graphs on disk, so that a restarted server does not export them again.

A graph is the same for every mask, but not for every processor: ONNX Runtime arranges weights for its vector units. So
the key covers the backbone, the range of stages, the input, all versions and the processor's features.
"""

import hashlib
import json
import logging
import struct
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from cascade import __version__, atomic
from cascade.cache import cache_folder, sweep, used
from cascade.kernels.weight_layout import BlockOrder

PACKAGES = ("torch", "timm", "onnx", "onnxruntime", "onnxruntime-gpu")
log = logging.getLogger(__name__)
Parts = tuple[bytes, list[BlockOrder], int, dict[str, list[int]]]
"""The model, the orders of its units, the index of the first unit, and the shapes of its inputs."""


def path_of(*key: object) -> Path:
    """The file for a key of plain values."""
    text = json.dumps([*_machine(), *key])
    return cache_folder() / "graphs" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"


@cache
def _machine() -> list[str]:
    """All versions and the processor's features. Finding them takes two milliseconds, for which passes would wait."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return [__version__, *map(_version, PACKAGES), features]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def read(path: Path) -> Parts | None:
    """The graph in a file; None where there is none, or it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            about: dict[str, Any] = json.loads(file.metadata()["graph"])
            tensors = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
        orders = [BlockOrder(block, tensors[f"columns.{i}"]) for i, block in enumerate(about["blocks"])]
        parts = tensors["model"].tobytes(), orders, about["first"], about["shapes"]
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, struct.error, ValueError, KeyError, TypeError) as error:
        log.info("a graph in the cache can't be read and is made again: %s", error)
        return None
    used(path)
    return parts


def write(path: Path, parts: Parts) -> None:
    """Keep a graph; without a writable cache the next start makes it again."""
    model, orders, first, shapes = parts
    tensors = {"model": torch.frombuffer(bytearray(model), dtype=torch.uint8)}
    tensors |= {f"columns.{i}": torch.from_numpy(np.ascontiguousarray(o.columns)) for i, o in enumerate(orders)}
    about = {"blocks": [order.block for order in orders], "first": first, "shapes": shapes}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent, "*.safetensors")
        with atomic.file(path) as beside:
            beside.write_bytes(save(tensors, metadata={"graph": json.dumps(about)}))
    except OSError as error:
        log.info("a graph is not kept: %s", error)
