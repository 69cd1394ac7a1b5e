"""A short benchmark on this machine: ``cascade bench``. Ratios within one run, medians over interleaved rounds."""

from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from PIL import Image
from rich.table import Table

from cascade.engine.engine import load
from cascade.engine.executors.selection import Kind
from cascade.engine.results import ItemError, Options


def table(path: Path, batch: int, rounds: int, weights: Path | None = None, kind: Kind = "auto") -> Table:
    """Milliseconds per batch of the plain backbone, each mode and a swap, also relative to the plain backbone.

    Decoding is not included; resizing is, in the modes. The images are noise, which takes as long as photos.
    """
    engine = load(path, weights=weights, executor=kind)
    ((name, version),) = engine.bundles
    bundle = engine.find(name, version)
    assert not isinstance(bundle, ItemError)
    executor = engine.executor(bundle)
    size = bundle.preprocessing.size
    pixels = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    noise = (pixels.clamp(-2, 2) * 63 + 127).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    images = [Image.fromarray(one) for one in noise]

    def plain() -> None:
        executor.swap(None)
        executor.run(pixels)

    def swap() -> None:
        engine.weight_cache.clear()
        executor.swap(None)
        executor.swap(bundle.dispatcher)

    runs: dict[str, Callable[[], object]] = {"plain backbone": plain, "swap, not materialized": swap}
    for mode in bundle.fusions:
        options = Options(mode=mode, labels=0, neighbors=0)
        runs[mode] = lambda options=options: engine.predict(images, options)  # type: ignore[misc]
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            begin = perf_counter()
            run()
            times[name].append((perf_counter() - begin) * 1000)
    base = median(times["plain backbone"])
    out = Table(
        "what",
        "ms (median)",
        "least",
        "most",
        "over plain",
        title=f"batch of {batch}, {rounds} rounds, executor {executor.kind} (relative error {executor.error:.1g})",
    )
    for name, ms in times.items():
        out.add_row(name, f"{median(ms):.1f}", f"{min(ms):.1f}", f"{max(ms):.1f}", f"{median(ms) / base:.2f}")
    return out
