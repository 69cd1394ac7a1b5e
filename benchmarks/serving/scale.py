"""Two thousand masks over five: throughput with a long queue, and the memory of a thousand masks."""

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np

from benchmarks import synthetic
from benchmarks.report import Figure, Rows, figure, single
from benchmarks.serving.mixed import BATCH, HELD, zipf
from benchmarks.subprocesses import peers, ratios, resident_bytes, rounds
from cascade.engine.batcher import Batcher
from cascade.engine.tenants import Tenant

TENANT = Tenant("bench")  # one with many bundles
QUEUED = 256
PATIENCE = 20.0
"""Seconds after which the oldest image goes first, whatever its group; the wait is about ten anyway."""


def build(name: str, models: int, at: int) -> Callable[[tuple[str, list[int]]], Any]:
    """An engine of ``models`` masks; ``("bytes", [])`` returns the growth of the process for the first ``at`` of them.

    ``("queue", models)`` keeps QUEUED images of these models waiting until none are left, and returns the waits.
    ``("arrival", models)`` runs them in batches in order of arrival, and returns the counts of the weight_cache.
    """
    backbone = synthetic.load(name)
    pixels = synthetic.noise(backbone, 64)
    engine = synthetic.engine_of([synthetic.single(backbone, "first", 0, dim=1)], HELD * synthetic.mask_bytes(backbone))
    before, grown = resident_bytes(), 0
    for i in range(models):
        engine.add(synthetic.single(backbone, str(i), i + 1, dim=1))
        if i + 1 == at:
            grown = resident_bytes() - before

    def work(wanted: tuple[str, list[int]]) -> Any:
        how, sequence = wanted
        if how == "bytes":
            return grown
        items = [synthetic.item(engine, str(model), pixels[i % 64]) for i, model in enumerate(sequence)]
        if how == "arrival":
            misses = engine.stats()["misses"]
            for first in range(0, len(items), BATCH):
                engine.run(items[first : first + BATCH])
            return engine.stats()["misses"] - misses
        waits: list[float] = []
        with Batcher(engine, max_batch=BATCH, patience=PATIENCE, queue=2 * QUEUED) as batcher:
            free = [0]
            futures: list[Future[Any]] = []
            for image in items:
                while len(futures) - free[0] >= QUEUED:
                    time.sleep(0.002)
                begin = time.perf_counter()
                future = batcher.submit_item(image, tenant=TENANT)

                def done(_: Any, begin: float = begin) -> None:
                    waits.append(time.perf_counter() - begin)
                    free[0] += 1

                future.add_done_callback(done)
                futures.append(future)
            failed = [f.result() for f in futures if not hasattr(f.result(), "cluster")]
        if failed:
            raise RuntimeError(f"{len(failed)} images were not answered: {failed[0]}")
        return waits

    return work


def measure(name: str, models: int, images: int, count: int, rows: Rows) -> dict[str, Figure]:
    """``images`` per round, Zipf 1.5."""
    out: dict[str, Figure] = {}
    few = [zipf(5, 1, seed, images)[0] for seed in range(count)]
    many = [zipf(models, 1, seed, images)[0] for seed in range(count)]
    with peers({"5": (build, name, 5, 5), "many": (build, name, models, min(models, 1000))}) as running:
        thousand = running["many"].time(("bytes", []))[1] * 1000 / min(models, 1000)
        for peer in running.values():
            peer.time(("queue", few[0][:QUEUED]))
        seconds: dict[str, list[float]] = {"5 queue": [], "many queue": [], "5 arrival": [], "many arrival": []}
        waits, missed = [], []
        for a, b in zip(few, many, strict=True):
            for how in ("queue", "arrival"):
                seconds[f"5 {how}"].append(running["5"].time((how, a))[0])
                taken, result = running["many"].time((how, b))
                seconds[f"many {how}"].append(taken)
                if how == "queue":
                    waits.append(float(np.quantile(result, 0.95)))
                else:
                    missed.append(result)
        groups = [len(set(batch)) for run in many for batch in np.split(np.array(run), images // BATCH)]
        alone = rounds({"many": running["many"]}, [("arrival", [0])] * count)["many"]
    for way, each in seconds.items():
        text = way.replace("many", f"{models}")
        text = text.replace(" queue", f" masks, {QUEUED} queued").replace(" arrival", " masks, in order of arrival")
        rows.add(text, figure([1000 * s / images for s in each]), "ms an image")
    rows.add(f"wait of 95 % at {QUEUED} queued, {models} masks", figure(waits), "s")
    rows.add(
        f"different masks in a batch of {BATCH}, {models} masks, arrival", figure([float(g) for g in groups]), "masks"
    )
    rows.add("swaps an image, arrival", figure([m / images for m in missed]), "swaps")
    rows.add("one image alone, materialized", figure([1000 * s for s in alone]), "ms")
    rows.add("1,000 masks, everything counted", single(thousand / 1e9), "GB")
    out["scale_5_to_2000"] = figure(ratios(seconds["5 queue"], seconds["many queue"]), ">= 0.9")
    out["scale_5_to_2000_arrival"] = figure(ratios(seconds["5 arrival"], seconds["many arrival"]), ">= 0.9")
    out["scale_p95_wait_seconds"] = figure(waits)
    out["resident_gb_1000"] = single(thousand / 1e9, "<= 3.5")
    return out
