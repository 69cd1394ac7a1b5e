"""The swap only: packed bits and original weights in, masked weights out, over a plain copy of the weights."""

import time
from collections.abc import Callable

import numpy as np
import torch

from benchmarks import synthetic
from benchmarks.report import Figure, Rows, figure
from benchmarks.subprocesses import peers, ratios
from cascade.engine.executors.selection import choose
from cascade.engine.weight_cache import WeightCache
from cascade.kernels.weight_layout import PackedMask
from cascade.model import masks
from cascade.model.masks import Mask

OFF = (0.075, 0.25, 0.5)
"""Fractions of weights that are off."""


def build(name: str) -> Callable[[float], dict[str, float]]:
    """Seconds of a swap and of a copy, one after the other, with a given fraction of weights switched off."""
    backbone = synthetic.load(name)
    executor = choose(synthetic.load(name), WeightCache(0), "onnx")
    flat = executor.layout  # type: ignore[attr-defined]
    packed: dict[float, PackedMask] = {}
    for off in OFF:
        active = torch.rand(backbone.weights.numel(), generator=torch.Generator().manual_seed(0)) >= off
        packed[off] = flat.pack(Mask("m", 0, masks.pack(active)))
    out, copy = torch.empty_like(flat.pristine), torch.empty_like(flat.pristine)
    naive = torch.from_numpy(np.unpackbits(packed[OFF[0]].bits.numpy(), bitorder="little"))[: len(out)]

    def once(off: float) -> dict[str, float]:
        works = {
            "swap": lambda: flat.materialize(packed[off], out),
            "copy": lambda: copy.copy_(flat.pristine),
            "naive": lambda: torch.mul(flat.pristine, naive, out=out),
        }
        seconds = {}
        for way, work in works.items():
            begin = time.perf_counter()
            work()
            seconds[way] = time.perf_counter() - begin
        return seconds

    return once


def measure(name: str, count: int, rows: Rows) -> dict[str, Figure]:
    """The worst of three densities, each the median over rounds."""
    with peers({"swap": (build, name)}) as running:
        found = {off: [running["swap"].time(off)[1] for _ in range(count + 1)][1:] for off in OFF}
    over = {}
    for off, seconds in found.items():
        text = f"{100 * off:g} % off"
        rows.add(f"swap, {text}", figure([1000 * s["swap"] for s in seconds]), "ms")
        rows.add(f"copy of the weights, {text}", figure([1000 * s["copy"] for s in seconds]), "ms")
        over[off] = figure(ratios([s["swap"] for s in seconds], [s["copy"] for s in seconds]), "<= 1.5")
    rows.add("multiply with unpacked bytes, no scales", figure([1000 * s["naive"] for s in found[OFF[0]]]), "ms")
    return {"swap_over_copy_cpu": max(over.values(), key=lambda f: f.value)}
