"""Precision of products: exact float32, TF32 on tensor cores with a 10-bit mantissa, or bfloat16."""

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch

Precision = Callable[[torch.device], contextlib.AbstractContextManager[object]]

DEVICE = threading.RLock()
"""Held by every pass on a GPU, and around every other use of one by an executor: PyTorch's precision switches belong to
the process, and while a CUDA graph is captured, no other thread may capture, free or synchronize (pytorch#63269)."""


@contextlib.contextmanager
def products(tf32: bool, device: torch.device) -> Iterator[None]:
    """Compute matrix products and convolutions in TF32, or exactly; PyTorch's default is TF32 for convolutions only.

    cuDNN benchmarks its algorithms once per shape and keeps the fastest. A CPU is always exact.
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
    """Compute float32 products in full precision, for every reference and every exact executor."""
    return products(False, device)


def tf32(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Compute float32 products in TF32; a GPU is needed."""
    return products(True, device)


def bf16(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Compute products in bfloat16, which has three digits, on any device."""
    return torch.autocast(device.type, torch.bfloat16)
