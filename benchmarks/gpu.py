"""Traffic that mixes many masks on a GPU, against copies of the weights on the same one.

    python -m benchmarks.gpu                                    # ResNet-50, 224 px
    python -m benchmarks.gpu --backbone vit_base_patch32_224    # or tf_efficientnet_lite0
    python -m benchmarks.gpu --only swap,mixed_distinct         # some of the measurements
    python -m benchmarks.gpu --tf32                             # products in TF32, of masks and of copies alike

Weights are seeded random ones. Images are decoded, and on the GPU but where the engine takes them. One process; the
ways that are compared take turns, round by round. A time is that of several runs, from an idle GPU to an idle GPU.
"""

import argparse
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import synthetic
from benchmarks.report import Figure, Rows, figure, report, single
from benchmarks.serving.baselines import copy_of
from benchmarks.serving.cascades import BATCH as FEW
from benchmarks.serving.cascades import CASES, EXPERTS
from benchmarks.serving.mixed import BATCH, HELD, uniform, zipf
from benchmarks.serving.scale import PATIENCE, QUEUED
from cascade.bundle.format import Bundle
from cascade.engine.batcher import Batcher
from cascade.engine.engine import Engine
from cascade.engine.executors.cuda import CudaExecutor
from cascade.engine.forward import Item
from cascade.engine.weight_cache import WeightCache
from cascade.model import backbone as backbones
from cascade.model.backbone import Backbone

DEVICE = "cuda"
BYTES = 1 << 28
"""What a measurement of bandwidth goes through before it comes back to a place: five times the cache of an H100."""

Figures = dict[str, Figure]
Ways = dict[str, Callable[[int], object]]


def seconds(ways: Ways, rounds: int, runs: int) -> dict[str, list[float]]:
    """Time of one run of each way, a value a round; ways take the number of the run."""
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
    """Until the GPU has nothing to do."""
    torch.cuda.synchronize()


def ratios(a: Iterable[float], b: Iterable[float]) -> list[float]:
    return [x / y for x, y in zip(a, b, strict=True)]


def executor_of(backbone: Backbone) -> CudaExecutor:
    """The backbone in the executor of a GPU, and nowhere else."""
    executor = CudaExecutor(backbone, WeightCache(2**40))
    backbone.release()
    return executor


def on_gpu(name: str) -> Backbone:
    return backbones.load(name, "random:0", device=DEVICE)


def engine_of(bundles: Iterable[Bundle], budget: int) -> Engine:
    engine = Engine(budget, DEVICE, executor="folded")
    for bundle in bundles:
        engine.add(bundle)
    return engine


def swap(name: str, rounds: int, rows: Rows) -> Figures:
    """One mask's weights, over a copy of as many; each run takes buffers that have left the cache."""
    executor = executor_of(on_gpu(name))
    flat, n = executor.layout, len(executor.layout.pristine)
    mask = flat.pack(synthetic.mask(synthetic.load(name), "m", 0, 0))
    sets = max(2, -(-BYTES // (8 * n)))
    sources = [flat.pristine, *(flat.pristine.clone() for _ in range(sets - 1))]
    outs = [torch.empty_like(flat.pristine) for _ in range(sets)]

    def fused(run: int) -> None:
        flat.pristine = sources[run % sets]
        flat.materialize(mask, outs[run % sets])

    ways: Ways = {"swap": fused, "copy": lambda run: outs[run % sets].copy_(sources[run % sets])}
    taken = seconds(ways, rounds, 20 * sets)
    moved = {"swap": 8 * n + n // 8 + mask.scales.nbytes, "copy": 8 * n}
    for way, each in taken.items():
        rows.add(f"{way}, {moved[way] / 1e6:.1f} MB read and written", figure([1e6 * s for s in each]), "us")
        rows.add(f"{way}, bandwidth", figure([moved[way] / s / 1e9 for s in each]), "GB/s")
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        fused(0)
        wait()
    launches = [event for event in seen.events() or [] if event.device_type == torch.autograd.DeviceType.CUDA]
    share = [moved["swap"] / a / (moved["copy"] / b) for a, b in zip(taken["swap"], taken["copy"], strict=True)]
    return {
        "swap_share_of_bandwidth_gpu": figure(share, ">= 0.7"),
        "swap_launches_gpu": single(len(launches), "<= 1"),
        "swap_over_copy_gpu": figure(ratios(taken["swap"], taken["copy"])),
    }


def mixed_distinct(name: str, rounds: int, rows: Rows) -> Figures:
    """As many masks as images, in one pass, over the unmasked backbone; and by swaps, image by image."""
    executor, backbone = executor_of(on_gpu(name)), synthetic.load(name)
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
        "mixed_distinct_gpu": figure(ratios(plain, each), ">= 0.5"),
        "mixed_distinct_by_swaps_gpu": figure(ratios(plain, swapped)),
    }


def engine_way(engine: Engine, backbone: Backbone, batches: list[list[int]]) -> Callable[[int], object]:
    pixels = synthetic.noise(backbone, 64)
    return lambda run: engine.run(
        [synthetic.item(engine, str(model), pixels[i % 64]) for i, model in enumerate(batches[run % len(batches)])]
    )


def mixed_uniform(name: str, rounds: int, rows: Rows) -> Figures:
    """Through the engine, over resident copies that answer without one."""
    models, backbone = 20, synthetic.load(name)
    before = torch.cuda.memory_allocated()
    engine = engine_of(
        (synthetic.single(backbone, str(i), i) for i in range(models)), HELD * synthetic.mask_bytes(backbone)
    )
    ours = torch.cuda.memory_allocated() - before
    copies = [
        executor_of(backbones.wrap(copy_of(backbone, synthetic.mask(backbone, "", 0, i)), name, "random:0", DEVICE))
        for i in range(models)
    ]
    theirs = torch.cuda.memory_allocated() - before - ours
    batches, x = uniform(models, 16), synthetic.noise(backbone, BATCH).to(DEVICE)

    def by_copies(run: int) -> None:
        batch = batches[run % len(batches)]
        for model in dict.fromkeys(batch):
            copies[model].run(x[[i for i, other in enumerate(batch) if other == model]])

    taken = seconds({"masks": engine_way(engine, backbone, batches), "copies": by_copies}, rounds, 8)
    for way, memory in (("masks", ours), ("copies", theirs)):
        rows.add(f"{models} models, {way}", figure([1000 * s / BATCH for s in taken[way]]), "ms an image", memory)
    return {"mixed_uniform_gpu": figure(ratios(taken["copies"], taken["masks"]), ">= 0.9")}


def identical(name: str, rounds: int, rows: Rows) -> Figures:
    """One mask throughout: through the engine, and in the executor alone, over the unmasked backbone."""
    backbone, executor = synthetic.load(name), executor_of(on_gpu(name))
    engine = engine_of([synthetic.single(backbone, "0", 0)], synthetic.mask_bytes(backbone))
    mask, x = executor.pack(synthetic.mask(backbone, "m", 0, 0)), synthetic.noise(backbone, BATCH).to(DEVICE)

    def plain(run: int) -> None:
        executor.swap(None)
        executor.run(x)

    def masked(run: int) -> None:
        executor.swap(mask)
        executor.run(x)

    ways: Ways = {"plain": plain, "masked": masked, "engine": engine_way(engine, backbone, [[0] * BATCH])}
    taken = seconds(ways, rounds, 8)
    for way, each in taken.items():
        rows.add(f"one mask throughout: {way}", figure([1000 * s / BATCH for s in each]), "ms an image")
    return {
        "identical_over_unmasked_gpu": figure(ratios(taken["plain"], taken["engine"]), ">= 0.97"),
        "identical_over_unmasked_executor_gpu": figure(ratios(taken["plain"], taken["masked"])),
    }


def cascades(name: str, rounds: int, rows: Rows) -> Figures:
    """A request over one plain pass, batch 8."""
    backbone, executor = synthetic.load(name), executor_of(on_gpu(name))
    pixels = synthetic.noise(backbone, 64)
    x = pixels[:FEW].to(DEVICE)
    ways: Ways = {"plain": lambda run: executor.run(x)}
    for case, (expert_from, mode, _) in CASES.items():
        stage = backbone.stage(expert_from)
        while backbone.offset(stage) == backbone.weights.numel():  # a stage without weights is none to adapt
            stage -= 1
        engine = engine_of([synthetic.cascade(backbone, "cascade", EXPERTS, stage)], 2**31)

        def request(run: int, engine: Engine = engine, mode: Any = mode) -> object:
            images = (pixels[(run * FEW + i) % 64] for i in range(FEW))
            return engine.run([synthetic.item(engine, "cascade", image, mode) for image in images])

        ways[case] = request
    taken = seconds(ways, rounds, 8)
    for way, each in taken.items():
        rows.add(way.replace("_", " "), figure([1000 * s for s in each]), f"ms for {FEW}")
    return {f"{case}_gpu": figure(ratios(taken[case], taken["plain"]), goal) for case, (*_, goal) in CASES.items()}


def scale(name: str, models: int, rounds: int, rows: Rows) -> Figures:
    """Throughput of many masks over that of five, zipf 1.5, through the batcher with a long queue."""
    backbone, images = synthetic.load(name), 2048
    pixels, engines = synthetic.noise(backbone, 64), {}
    for count in (5, models):
        bundles = (synthetic.single(backbone, str(i), i, dim=1) for i in range(count))
        engines[count] = engine_of(bundles, HELD * synthetic.mask_bytes(backbone))
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
        "scale_5_to_2000_gpu": figure(ratios(taken[5], taken[models]), ">= 0.95"),
        "scale_p95_wait_seconds_gpu": figure(waits),
    }


def queued(engine: Engine, items: list[Item]) -> list[float]:
    """Keep QUEUED of the images waiting until there are no more; how long each waited, seconds."""
    waits: list[float] = []
    futures: list[Future[Any]] = []
    with Batcher(engine, max_batch=BATCH, patience=PATIENCE, queue=QUEUED) as batcher:
        for image in items:
            while len(futures) - len(waits) >= QUEUED:
                time.sleep(0.0002)
            begin = time.perf_counter()

            def done(_: Any, begin: float = begin) -> None:
                waits.append(time.perf_counter() - begin)

            futures.append(batcher.submit_item(image))
            futures[-1].add_done_callback(done)
        failed = [f.result() for f in futures if not hasattr(f.result(), "cluster")]
    if failed:
        raise RuntimeError(f"{len(failed)} images were not answered: {failed[0]}")
    return waits


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--backbone", default="resnet50")
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--only", help="names of measurements, separated by commas")
    options.add_argument("--masks", type=int, default=2000, help="of scale_5_to_2000")
    options.add_argument("--tf32", action="store_true")
    chosen = options.parse_args()
    if DEVICE == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu needs a CUDA device, and there is none here; benchmarks.serving needs none")
    if chosen.tf32:
        torch.set_float32_matmul_precision("high")
    name, rounds, rows = chosen.backbone, chosen.rounds, Rows(f"{chosen.backbone} on a GPU")
    measurements: dict[str, Callable[[], Figures]] = {
        "swap": lambda: swap(name, rounds, rows),
        "mixed_distinct": lambda: mixed_distinct(name, rounds, rows),
        "mixed_uniform": lambda: mixed_uniform(name, rounds, rows),
        "identical": lambda: identical(name, rounds, rows),
        "cascades": lambda: cascades(name, rounds, rows),
        "scale": lambda: scale(name, chosen.masks, max(3, rounds // 2), rows),
    }
    wanted = chosen.only.split(",") if chosen.only else list(measurements)
    if unknown := set(wanted) - set(measurements):
        options.error(f"no measurement {' '.join(unknown)}; there are: {' '.join(measurements)}")
    figures: Figures = {}
    for key in wanted:
        print(f"measuring {key} ...", flush=True)
        figures |= measurements[key]()
        torch.cuda.empty_cache()
    suffix = ("-tf32" if chosen.tf32 else "") + (f"-{'-'.join(wanted)}" if chosen.only else "")
    report(f"gpu-{name}{suffix}", figures, rows.table, executor=CudaExecutor.__name__)


if __name__ == "__main__":
    main()
