"""``benchmarks.gpu`` without a GPU: the CUDA executor as it runs on a CPU, and nothing to wait for.

python -m tests.helpers.gpu_on_cpu --backbone test_resnet --only swap
"""

from collections.abc import Callable
from typing import Any

import torch
import typer

from benchmarks import gpu, gpu_device, gpu_features
from cascade.engine import resident
from cascade.engine.executors import cuda
from cascade.engine.executors.cuda import CudaExecutor
from cascade.engine.weight_cache import WeightCache
from cascade.model.backbone import Backbone


def choose(backbone: Backbone, weight_cache: WeightCache, *_: Any) -> CudaExecutor:
    return CudaExecutor(backbone, weight_cache)


def stub(replace: Callable[[object, str, object], None]) -> None:
    """Put the CPU in place of the GPU; ``replace`` is ``setattr``, or that of a monkeypatch."""
    for module in (gpu, gpu_device, gpu_features):
        replace(module, "DEVICE", "cpu")
    replace(gpu, "BYTES", 1 << 20)
    replace(gpu, "IMAGES", 64)
    replace(cuda, "BUCKETS", (1, *cuda.BUCKETS[3:]))
    replace(resident, "choose", choose)
    for name in ("synchronize", "empty_cache"):
        replace(torch.cuda, name, lambda *_: None)
    replace(torch.cuda, "memory_allocated", lambda *_: 0)


if __name__ == "__main__":
    stub(setattr)
    typer.run(gpu.main)
