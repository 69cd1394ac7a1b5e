"""Traffic that mixes many masks on a GPU, against copies of the weights on the same GPU.

    python -m benchmarks.gpu                                    # ResNet-50, 224 px
    python -m benchmarks.gpu --backbone vit_base_patch32_224    # or tf_efficientnet_lite0
    python -m benchmarks.gpu --only swap,mixed_distinct         # some of the measurements
    python -m benchmarks.gpu --precision bf16                   # or tf32; masks and copies alike

Weights are random with a seed, images are already decoded. Alternatives start from the same bytes on the host. All run
in one process and take turns, round by round. A time covers several runs, from an idle GPU to an idle GPU.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from torch.profiler import ProfilerActivity, profile

from benchmarks import synthetic
from benchmarks.gpu_device import (
    DEVICE,
    Figures,
    Ways,
    engine_of,
    executor_of,
    on_gpu,
    pictures,
    ratios,
    seconds,
    wait,
)
from benchmarks.gpu_features import deferral, dispatch, executors, loading
from benchmarks.report import Rows, figure, report, single
from benchmarks.serving.baselines import copy_of
from benchmarks.serving.cascades import BATCH as FEW
from benchmarks.serving.cascades import CASES, EXPERTS
from benchmarks.serving.mixed import BATCH, HELD, uniform, zipf
from benchmarks.serving.scale import PATIENCE, QUEUED, TENANT
from cascade.engine.batcher import Batcher
from cascade.engine.engine import Engine
from cascade.engine.executors.selection import Kind
from cascade.engine.items import Item, stack
from cascade.model import backbone as backbones
from cascade.model.backbone import Backbone

KINDS: dict[str, Kind] = {"float32": "folded", "tf32": "tf32", "bf16": "bf16"}
BYTES = 1 << 28
"""What a measurement of bandwidth goes through before it returns to a place: five times the cache of an H100."""

IMAGES = 2048
"""Images of a round of the measurement scale."""


def swap(name: str, kind: Kind, rounds: int, rows: Rows) -> Figures:
    """The weights of a mask, and of a 1-bit delta, over a copy of as many float32; buffers are never cached."""
    executor = executor_of(on_gpu(name), kind)
    flat, n = executor.layout, len(executor.layout.pristine)
    backbone = synthetic.load(name)
    mask = synthetic.mask(backbone, "m", 0, 0)
    steps = {parameter: torch.full((count,), 0.01).half() for parameter, count in backbone.rows(0).items()}
    packed = {"swap": executor.pack(mask), "delta": executor.pack(replace(mask, deltas=steps))}
    sets = max(2, -(-BYTES // (8 * n)))
    sources = [flat.pristine, *(flat.pristine.clone() for _ in range(sets - 1))]
    outs = [torch.empty_like(executor.plain) for _ in range(sets)]
    copies = [torch.empty_like(flat.pristine) for _ in range(sets)]

    def fused(run: int, kind: str = "swap") -> None:
        flat.pristine = sources[run % sets]
        flat.materialize(packed[kind], outs[run % sets])

    ways: Ways = {
        "swap": fused,
        "delta": lambda run: fused(run, "delta"),
        "copy": lambda run: copies[run % sets].copy_(sources[run % sets]),
    }
    taken = seconds(ways, rounds, 20 * sets)
    width = 4 + executor.dtype.itemsize
    small = n // 8 + packed["swap"].scales.nbytes
    moved = {"swap": width * n + small, "delta": width * n + small + packed["delta"].steps.nbytes, "copy": 8 * n}
    for way, each in taken.items():
        rows.add(f"{way}, {moved[way] / 1e6:.1f} MB read and written", figure([1e6 * s for s in each]), "us")
        rows.add(f"{way}, bandwidth", figure([moved[way] / s / 1e9 for s in each]), "GB/s")
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        fused(0)
        wait()
    launches = [event for event in seen.events() or [] if event.device_type == torch.autograd.DeviceType.CUDA]
    share = {way: [moved[way] / moved["copy"] * x for x in ratios(taken["copy"], taken[way])] for way in packed}
    return {
        "swap_share_of_bandwidth_gpu": figure(share["swap"], ">= 0.8"),
        "delta_share_of_bandwidth_gpu": figure(share["delta"]),
        "swap_launches_gpu": single(len(launches), "<= 1"),
        "swap_over_copy_gpu": figure(ratios(taken["swap"], taken["copy"])),
    }


def mixed_distinct(name: str, kind: Kind, rounds: int, rows: Rows) -> Figures:
    """A different mask per image in one pass, over the unmasked backbone; and with swaps, image by image."""
    executor, backbone = executor_of(on_gpu(name), kind), synthetic.load(name)
    masks = [executor.pack(synthetic.mask(backbone, "m", 0, i)) for i in range(BATCH)]
    x = synthetic.noise(backbone, BATCH).to(DEVICE)

    def by_swaps(run: int) -> None:
        for i, mask in enumerate(masks):
            executor.swap(mask)
            executor.run(x[i : i + 1])
        executor.swap(None)

    ways: Ways = {
        "the unmasked backbone": lambda run: executor.run(x),
        f"{BATCH} masks, inside the products": lambda run: executor.run_each(x, masks, 0),
        f"{BATCH} masks, by swaps": by_swaps,
    }
    taken = seconds(ways, rounds, 5)
    for way, each in taken.items():
        rows.add(way, figure([1000 * s / BATCH for s in each]), "ms an image")
    plain, each, swapped = taken.values()
    return {
        "mixed_distinct_gpu": figure(ratios(plain, each), ">= 0.6" if kind == "bf16" else ">= 0.5"),
        "mixed_distinct_by_swaps_gpu": figure(ratios(plain, swapped)),
    }


def engine_way(engine: Engine, backbone: Backbone, batches: list[list[int]]) -> Callable[[int], object]:
    pixels = pictures(backbone, 64)
    return lambda run: engine.run(
        [synthetic.item(engine, str(model), pixels[i % 64]) for i, model in enumerate(batches[run % len(batches)])]
    )


def mixed_uniform(name: str, kind: Kind, rounds: int, rows: Rows) -> Figures:
    """Through the engine, over resident copies without an engine, and over the unmasked backbone."""
    models, backbone = 20, synthetic.load(name)
    before = torch.cuda.memory_allocated()
    engine = engine_of(
        (synthetic.single(backbone, str(i), i) for i in range(models)), HELD * synthetic.mask_bytes(backbone), kind
    )
    ours = torch.cuda.memory_allocated() - before
    copies = [
        executor_of(
            backbones.wrap(copy_of(backbone, synthetic.mask(backbone, "", 0, i)), name, "random:0", DEVICE), kind
        )
        for i in range(models)
    ]
    theirs = torch.cuda.memory_allocated() - before - ours
    batches = uniform(models, 16)
    items = [synthetic.item(engine, "0", image) for image in pictures(backbone, BATCH)]

    def by_copies(run: int) -> None:
        x, batch = stack(items, DEVICE), batches[run % len(batches)]
        for model in dict.fromkeys(batch):
            copies[model].run(x[[i for i, other in enumerate(batch) if other == model]])

    ways: Ways = {
        "masks": engine_way(engine, backbone, batches),
        "copies": by_copies,
        "unmasked": lambda run: copies[0].run(stack(items, DEVICE)),
    }
    taken = seconds(ways, rounds, 8)
    for way, memory in (("masks", ours), ("copies", theirs)):
        rows.add(f"{models} models, {way}", figure([1000 * s / BATCH for s in taken[way]]), "ms an image", memory)
    return {
        "mixed_uniform_gpu": figure(ratios(taken["copies"], taken["masks"]), ">= 0.9"),
        "mixed_uniform_over_unmasked_gpu": figure(ratios(taken["unmasked"], taken["masks"]), ">= 0.8"),
    }


def identical(name: str, kind: Kind, rounds: int, rows: Rows) -> Figures:
    """One mask throughout: through the engine, and in the executor alone, over the unmasked backbone."""
    backbone, executor = synthetic.load(name), executor_of(on_gpu(name), kind)
    engine = engine_of([synthetic.single(backbone, "0", 0)], synthetic.mask_bytes(backbone), kind)
    mask = executor.pack(synthetic.mask(backbone, "m", 0, 0))
    items = [synthetic.item(engine, "0", image) for image in pictures(backbone, BATCH)]

    def plain(run: int) -> None:
        executor.swap(None)
        executor.run(stack(items, DEVICE))

    def masked(run: int) -> None:
        executor.swap(mask)
        executor.run(stack(items, DEVICE))

    ways: Ways = {"plain": plain, "masked": masked, "engine": engine_way(engine, backbone, [[0] * BATCH])}
    taken = seconds(ways, rounds, 8)
    for way, each in taken.items():
        rows.add(f"one mask throughout: {way}", figure([1000 * s / BATCH for s in each]), "ms an image")
    return {
        "identical_over_unmasked_gpu": figure(ratios(taken["plain"], taken["engine"]), ">= 0.95"),
        "identical_over_unmasked_executor_gpu": figure(ratios(taken["plain"], taken["masked"])),
    }


def cascades(name: str, kind: Kind, rounds: int, rows: Rows) -> Figures:
    """A request over one plain pass, batch 8."""
    backbone, executor = synthetic.load(name), executor_of(on_gpu(name), kind)
    pixels = pictures(backbone, 64)
    items: list[Item] = []
    ways: Ways = {"plain": lambda run: executor.run(stack(items, DEVICE))}
    for case, (expert_from, mode, _) in CASES.items():
        stage = backbone.stage(expert_from)
        while backbone.offset(stage) == backbone.weights.numel():  # a stage without weights is none to adapt
            stage -= 1
        engine = engine_of([synthetic.cascade(backbone, "cascade", EXPERTS, stage)], 2**31, kind)
        items = items or [synthetic.item(engine, "cascade", image) for image in pixels[:FEW]]

        def request(run: int, engine: Engine = engine, mode: Any = mode) -> object:
            images = (pixels[(run * FEW + i) % 64] for i in range(FEW))
            return engine.run([synthetic.item(engine, "cascade", image, mode) for image in images])

        ways[case] = request
    taken = seconds(ways, rounds, 8)
    for way, each in taken.items():
        rows.add(way.replace("_", " "), figure([1000 * s for s in each]), f"ms for {FEW}")
    return {f"{case}_gpu": figure(ratios(taken[case], taken["plain"]), goal) for case, (*_, goal) in CASES.items()}


def scale(name: str, kind: Kind, models: int, rounds: int, rows: Rows) -> Figures:
    """Throughput of many masks over that of five, zipf 1.5, through the batcher with a long queue."""
    backbone, images = synthetic.load(name), IMAGES
    pixels, engines = pictures(backbone, 64), {}
    for count in (5, models):
        bundles = (synthetic.single(backbone, str(i), i, dim=1) for i in range(count))
        engines[count] = engine_of(bundles, HELD * synthetic.mask_bytes(backbone), kind)
    taken: dict[int, list[float]] = {count: [] for count in engines}
    waits: list[float] = []
    for nth in range(rounds + 1):  # the first one warms up
        for count, engine in engines.items():
            sequence = zipf(count, 1, nth, images)[0]
            items = [synthetic.item(engine, str(model), pixels[i % 64]) for i, model in enumerate(sequence)]
            begin = time.perf_counter()
            waited = queued(engine, items)
            if nth:
                taken[count].append(time.perf_counter() - begin)
                waits += [float(np.quantile(waited, 0.95))] if count == models else []
    for count, each in taken.items():
        rows.add(f"{count} masks, {QUEUED} queued", figure([1000 * s / images for s in each]), "ms an image")
    rows.add(f"wait of 95 %, {models} masks", figure(waits), "s")
    packed = single(engines[models].stats()["packed_bytes"] * 1000 / models / 1e9)
    rows.add("1,000 masks, packed", packed, "GB")
    return {
        f"scale_5_to_{models}_gpu": figure(ratios(taken[5], taken[models]), ">= 0.95"),
        "scale_p95_wait_seconds_gpu": figure(waits),
    }


def queued(engine: Engine, items: list[Item]) -> list[float]:
    """Keep QUEUED images waiting until none are left; returns how long each waited, seconds."""
    waits: list[float] = []
    futures: list[Future[Any]] = []
    with Batcher(engine, max_batch=BATCH, patience=PATIENCE, queue=2 * QUEUED) as batcher:
        for image in items:
            while len(futures) - len(waits) >= QUEUED:
                time.sleep(0.0002)
            begin = time.perf_counter()

            def done(_: Any, begin: float = begin) -> None:
                waits.append(time.perf_counter() - begin)

            futures.append(batcher.submit_item(image, tenant=TENANT))
            futures[-1].add_done_callback(done)
        failed = [f.result() for f in futures if not hasattr(f.result(), "cluster")]
    if failed:
        raise RuntimeError(f"{len(failed)} images were not answered: {failed[0]}")
    return waits


def main(
    backbone: str = "resnet50",
    rounds: int = 9,
    only: Annotated[str, typer.Option(help="Names of measurements, separated by commas.")] = "",
    masks: Annotated[int, typer.Option(help="Of the measurement scale.")] = 2000,
    precision: Literal["float32", "tf32", "bf16"] = "float32",
    out: Annotated[
        Path | None, typer.Option(help="JSON file to write instead of the one in benchmarks/results.")
    ] = None,
) -> None:
    """Measure on a GPU."""
    if DEVICE == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu needs a CUDA device, and there is none here; benchmarks.serving needs none")
    name, rows = backbone, Rows(f"{backbone} on a GPU, {precision}")
    kind = KINDS[precision]
    measurements: dict[str, Callable[[], Figures]] = {
        "swap": lambda: swap(name, kind, rounds, rows),
        "executors": lambda: executors(name, kind, rounds, rows),
        "mixed_distinct": lambda: mixed_distinct(name, kind, rounds, rows),
        "mixed_uniform": lambda: mixed_uniform(name, kind, rounds, rows),
        "identical": lambda: identical(name, kind, rounds, rows),
        "cascades": lambda: cascades(name, kind, rounds, rows),
        "loading": lambda: loading(name, kind, rounds, rows),
        "dispatch": lambda: dispatch(name, kind, rounds, rows),
        "deferral": lambda: deferral(name, kind, rounds, rows),
        "scale": lambda: scale(name, kind, masks, max(3, rounds // 2), rows),
    }
    wanted = only.split(",") if only else list(measurements)
    if unknown := set(wanted) - set(measurements):
        raise typer.BadParameter(f"no measurement {' '.join(unknown)}; there are: {' '.join(measurements)}")
    figures: Figures = {}
    for key in wanted:
        print(f"measuring {key} ...", flush=True)
        figures |= measurements[key]()
        torch.cuda.empty_cache()
    parts = [name, *([precision] if precision != "float32" else []), *(wanted if only else [])]
    report(f"gpu-{'-'.join(parts)}", figures, rows.table, executor=f"CudaExecutor, {precision}", out=out)


if __name__ == "__main__":
    typer.run(main)
