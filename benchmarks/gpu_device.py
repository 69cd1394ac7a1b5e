"""What all measurements on a GPU share: where they run, how they take turns, and what they run on."""

import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from benchmarks import synthetic
from benchmarks.report import Figure
from cascade.bundle.format import Bundle
from cascade.engine.engine import Engine
from cascade.engine.executors.cuda import CudaExecutor
from cascade.engine.executors.selection import Kind
from cascade.engine.weight_cache import WeightCache
from cascade.model import backbone as backbones
from cascade.model.backbone import Backbone

DEVICE = "cuda"

Figures = dict[str, Figure]
Ways = dict[str, Callable[[int], object]]


def seconds(ways: Ways, rounds: int, runs: int) -> dict[str, list[float]]:
    """Time of one run of each alternative, one value per round; alternatives take the number of the run."""
    for run in range(3):
        for way in ways.values():
            way(run)
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for nth in range(rounds):
        for name, way in ways.items():
            wait()
            begin = time.perf_counter()
            for run in range(nth * runs, (nth + 1) * runs):
                way(run)
            wait()
            taken[name].append((time.perf_counter() - begin) / runs)
    return taken


def wait() -> None:
    """Wait until the GPU is idle."""
    torch.cuda.synchronize()


def ratios(a: Iterable[float], b: Iterable[float]) -> list[float]:
    return [x / y for x, y in zip(a, b, strict=True)]


def executor_of(backbone: Backbone, kind: Kind) -> CudaExecutor:
    """The backbone in the GPU's executor only."""
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    executor = CudaExecutor(backbone, WeightCache(2**40), dtype, tf32=kind == "tf32")
    backbone.release()
    return executor


def on_gpu(name: str) -> Backbone:
    return backbones.load(name, "random:0", device=DEVICE)


def pictures(backbone: Backbone, count: int) -> Tensor:
    """Decoded images in the engine's input format, uint8 [count, 3, H, W], channels last."""
    noise = (synthetic.noise(backbone, count).clamp(-2, 2) * 63 + 127).to(torch.uint8)
    return noise.contiguous(memory_format=torch.channels_last)


def engine_of(bundles: Iterable[Bundle], budget: int, kind: Kind) -> Engine:
    engine = Engine(budget, DEVICE, executor=kind)
    for bundle in bundles:
        engine.add(bundle)
    return engine
