"""How products of float32 are computed: exactly, or in TF32 on tensor cores with 10 bits of mantissa."""

import contextlib
import threading
from collections.abc import Iterator

import torch

DEVICE = threading.RLock()
"""Held around every use of a GPU by an executor: PyTorch's precision switches belong to the process, and while a CUDA
graph is captured, no other thread may capture, free or synchronize (pytorch#63269)."""


@contextlib.contextmanager
def products(tf32: bool, device: torch.device) -> Iterator[None]:
    """Matrix products and convolutions in TF32, or exact; by default PyTorch takes TF32 for convolutions alone.

    cuDNN measures its algorithms once for each shape and keeps the fastest. A CPU computes exactly as it is.
    """
    if device.type != "cuda":
        yield
        return
    with DEVICE:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        try:
            deterministic = torch.backends.cudnn.deterministic
            with torch.backends.cudnn.flags(
                enabled=True, benchmark=True, benchmark_limit=4, deterministic=deterministic, allow_tf32=tf32
            ):
                yield
        finally:
            torch.set_float32_matmul_precision(before)


def exact(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Products of float32 as exact as float32, for every reference and every exact executor."""
    return products(False, device)
