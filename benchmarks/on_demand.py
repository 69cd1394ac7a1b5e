"""On-demand loading: start time with a large store, the cost of a cold start, and the cost of full memory.

    python -m benchmarks.on_demand                            # ResNet-50: 10,000 and 2,000 bundles
    python -m benchmarks.on_demand --backbone tf_efficientnet_lite0 --many 2000

Every bundle of the store is one random mask over all weights. The files of all bundles are links to those of one, so
they are in the page cache, as a local disk's files soon are. Everything runs in one process, interleaved.

The last figure is about passes of other bundles while a bundle is loaded whose mask begins at a stage that no other one
begins at. Its graphs are exported and optimized, since the cache on disk is empty.
"""

import os
import shutil
import threading
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated
from unittest.mock import patch

import numpy as np
import torch
import typer
from PIL import Image
from rich.progress import track

from benchmarks import synthetic
from benchmarks.images import sheet
from benchmarks.report import Figure, Rows, figure, report
from benchmarks.report import single as once
from cascade import Engine, Options, Prediction
from cascade.bundle.format import Bundle, write
from cascade.bundle.schema import DomainCard
from cascade.bundle.store import Store
from cascade.engine.items import Item
from cascade.engine.on_demand import OnDemandRegistry
from cascade.model.backbone import Backbone
from cascade.model.domain import MAX_WIDTH
from training import domains

FEW = 10
ZIPF = 1.1
BATCH = 8
MASKS = 8  # materialized at a time
PASSES = 30  # before a load, for the median


def links(first: Path, store: Path, count: int) -> Path:
    """A store with ``count`` bundles, all hard links to the files of one."""
    for n in range(count):
        folder = store / f"tenant-{n:05d}" / "1"
        folder.mkdir(parents=True)
        for file in first.iterdir():
            os.link(file, folder / file.name)
    return store


def opened(store: Path, budget: int, memory: int | None = None) -> OnDemandRegistry:
    registry = OnDemandRegistry(Engine(budget, memory_bytes=memory), Store(store))
    registry.reload()
    return registry


def ask(registry: OnDemandRegistry, names: Iterable[int], image: Image.Image) -> float:
    """Seconds of one answer per name, in batches."""
    names = [*names]
    begun = time.perf_counter()
    for first in range(0, len(names), BATCH):
        part = names[first : first + BATCH]
        options = [Options(f"tenant-{n:05d}", labels=0, neighbors=0) for n in part]
        answers = registry.engine.predict([image] * len(part), options)
        assert all(isinstance(answer, Prediction) for answer in answers)
    return time.perf_counter() - begun


def with_domain(bundle: Bundle) -> Bundle:
    """The bundle with a domain of random numbers, of the usual size."""
    stage = len(bundle.card.backbone.stages) // 2
    card = bundle.card.model_copy(update={"domain": DomainCard(stage=stage), "format": 2})
    features = torch.randn(400, MAX_WIDTH, generator=torch.Generator().manual_seed(0))
    return replace(bundle, card=card, domain=domains.fit(features))


def start(stores: dict[int, Path], budget: int, image: Image.Image, rounds: int) -> dict[int, list[float]]:
    """Seconds from nothing to the first answer, by the number of bundles, whose domains are read in the background."""
    seconds: dict[int, list[float]] = {count: [] for count in stores}
    for nth in track(range(rounds + 1), "start"):
        for count, store in stores.items():
            begun = time.perf_counter()
            registry = opened(store, budget)
            with registry.watching(3600):
                ask(registry, [nth % FEW], image)
                took = time.perf_counter() - begun
            if nth:  # the first one warms the caches of this process
                seconds[count].append(took)
    return seconds


def learn(store: Path, budget: int) -> tuple[float, int]:
    """Seconds until every bundle of the store is a target of dispatch, half of them idle, and bytes of the domains."""
    registry = opened(store, budget)
    begun = time.perf_counter()
    registry.learn()
    assert registry.engine.known is not None
    return time.perf_counter() - begun, registry.engine.known.bytes


def cold(store: Path, budget: int, image: Image.Image, rounds: int, images: int) -> list[float]:
    """Seconds of the first request for a bundle, over those of the next one: its mask is then applied already."""
    registry = opened(store, budget)
    for n in range(MASKS):  # a server that has run for a while reuses the memory of evicted weights
        ask(registry, [n] * images, image)
    ratios = []
    for n in range(MASKS, MASKS + rounds):
        first = ask(registry, [n] * images, image)
        ratios.append(first / ask(registry, [n] * images, image))
    return ratios


def thrash(store: Path, budget: int, image: Image.Image, room: int, requests: int, rounds: int) -> list[float]:
    """Throughput with room for some bundles over that with all bundles loaded, under the same Zipf traffic."""
    names = [path.name for path in sorted(store.iterdir())]
    whole = opened(store, budget)
    for name in track(names, "loading all"):
        whole.fetch(name)
    used = whole.engine.stats()
    part = opened(store, budget, used["backbone_bytes"] + room * used["packed_bytes"] // len(names))
    weights = 1 / np.arange(1, len(names) + 1) ** ZIPF
    draw = np.random.default_rng(0)
    ratios = []
    for nth in track(range(rounds + 1), "zipf"):
        wanted = draw.choice(len(names), requests, p=weights / weights.sum()).tolist()
        seconds = [ask(registry, wanted, image) for registry in (part, whole)[:: 1 if nth % 2 else -1]]
        fewer, all_of_them = seconds if nth % 2 else seconds[::-1]
        if nth:  # the first round fills the memory
            ratios.append(all_of_them / fewer)
    return ratios


def stall(
    network: Backbone, folder: Path, budget: int, image: Image.Image, rounds: int
) -> tuple[list[float], list[float]]:
    """The longest pass of another bundle while one with a new first stage is loaded, over the median pass before.

    Returns:
        That, and the same with nothing loaded for as long: what the machine itself adds. One value per round each.
    """
    stages = range(1, min(rounds, len(network.stages) - 1) + 1)
    names = {stage: f"tenant-{stage:05d}" for stage in (0, *stages)}
    for stage, name in names.items():
        write(synthetic.single(network, name, stage, mask_from=stage), folder / name / "1")
    registry = opened(folder, budget)
    engine = registry.engine
    ask(registry, [0], image)
    item = engine.prepare(image, Options(names[0], labels=0, neighbors=0))
    assert isinstance(item, Item)
    passes: list[tuple[float, float]] = []  # begin and end, seconds
    done = threading.Event()

    def work() -> None:
        while not done.is_set():
            begun = time.perf_counter()
            engine.run([item])
            passes.append((begun, time.perf_counter()))

    beside, alone = [], []
    thread = threading.Thread(target=work)
    thread.start()
    with TemporaryDirectory(prefix="cascade-graphs-") as empty, patch.dict(os.environ, XDG_CACHE_HOME=empty):
        for stage in track(stages, "stall"):
            passes.clear()
            while len(passes) < PASSES:
                time.sleep(0.01)
            begun = time.perf_counter()
            registry.fetch(names[stage])
            ended = time.perf_counter()
            assert names[stage] in engine.names
            time.sleep(ended - begun)
            seen = [*passes]
            usual = median(b - a for a, b in seen if b < begun)
            beside.append(max(b - a for a, b in seen if b > begun and a < ended) / usual)
            alone.append(max(b - a for a, b in seen if a >= ended) / usual)
    done.set()
    thread.join()
    return beside, alone


def main(
    backbone: str = "resnet50",
    many: Annotated[int, typer.Option(help="Bundles of the large store.")] = 10_000,
    traffic: Annotated[int, typer.Option(help="Bundles under Zipf traffic.")] = 2000,
    room: Annotated[int, typer.Option(help="How many of these fit.")] = 200,
    requests: Annotated[int, typer.Option(help="Images of a round.")] = 256,
    rounds: int = 5,
) -> None:
    """Measure start, cold requests and a full memory."""
    network = synthetic.load(backbone)
    budget = MASKS * synthetic.mask_bytes(network)
    image = sheet("cifar10")[0]
    with TemporaryDirectory(prefix="cascade-on-demand-") as name:
        folder = Path(name)
        first = write(with_domain(synthetic.single(network, "first", 0)), folder / "first" / "1")
        stores = {count: links(first, folder / f"store-{count}", count) for count in (FEW, many)}
        seconds = start(stores, budget, image, rounds)
        ratios = {images: cold(stores[many], budget, image, 2 * rounds, images) for images in (1, BATCH)}
        learned, size = learn(stores[many], budget)
        shutil.rmtree(folder / f"store-{many}")
        throughput = thrash(links(first, folder / "traffic", traffic), budget, image, room, requests, rounds)
        beside, alone = stall(network, folder / "stall", budget, image, rounds)
    rows = Rows(f"{backbone}, one mask a bundle")
    for count, values in seconds.items():
        rows.add(f"first answer, {count:,} bundles in the store", figure(values), "s")
    rows.add(f"domains of {many:,} bundles, in the background", once(learned), "s", size)
    figures: dict[str, Figure] = {
        "start_10000" if many == 10_000 else f"start_{many}": figure(
            [large / small for small, large in zip(seconds[FEW], seconds[many], strict=True)], "<= 1.5"
        ),
        "cold_over_warm_bundle": figure(ratios[1], "<= 2.5"),
        "cold_over_warm_bundle_batch": figure(ratios[BATCH], "<= 1.5"),
        "thrash": figure(throughput, ">= 0.8"),
        "domains_seconds": once(learned),
        "domains_bytes": once(size),
        "worst_stall": figure(beside, "<= 2"),
        "worst_stall_alone": figure(alone),
    }
    report(f"on-demand-{backbone}", figures, rows.table, executor=synthetic.executor_name(backbone))


if __name__ == "__main__":
    typer.run(main)
