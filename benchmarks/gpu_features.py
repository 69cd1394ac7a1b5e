"""On a GPU: the executors, images without a bundle's name, two input sizes, and what it takes to load a bundle."""

import time
from dataclasses import replace

import torch

from benchmarks import synthetic
from benchmarks.gpu_device import DEVICE, Figures, Ways, engine_of, on_gpu, pictures, ratios, seconds, wait
from benchmarks.report import Rows, figure, single
from benchmarks.serving.mixed import BATCH
from cascade.bundle.format import Bundle
from cascade.bundle.schema import DeferralCard, DomainCard
from cascade.engine.engine import Engine
from cascade.engine.executors.selection import COARSE, ON_GPU, Kind, choose
from cascade.engine.items import Item, OpenItem, Resolution, stack
from cascade.engine.weight_cache import WeightCache
from cascade.errors import CascadeError
from cascade.model.backbone import Backbone
from cascade.model.domain import pooled
from cascade.model.heads import Linear
from cascade.model.preprocessing import Preprocessing

BUNDLES = 5


def executors(name: str, _: Kind, rounds: int, rows: Rows) -> Figures:
    """The unmasked backbone in every executor that ``auto`` chooses among on a GPU, over exact float32."""
    x, found = synthetic.noise(synthetic.load(name), BATCH).to(DEVICE), {}
    for kind in ON_GPU:
        try:
            found[kind] = choose(on_gpu(name), WeightCache(2**31), kind)
        except CascadeError as error:
            print(f"executor {kind} is left out: {error}")
    ways: Ways = {kind: lambda run, executor=executor: executor.run(x) for kind, executor in found.items()}  # type: ignore[misc]
    taken = seconds(ways, rounds, 8)
    for kind, executor in found.items():
        rows.add(
            f"executor {kind}, relative error {executor.error:.1g}",
            figure([1000 * s / BATCH for s in taken[kind]]),
            "ms an image",
        )
    others = {kind: executor for kind, executor in found.items() if kind != "folded"}
    figures = {f"{kind}_over_float32_gpu": figure(ratios(taken["folded"], taken[kind])) for kind in others}
    return figures | {f"{kind}_error_gpu": single(found[kind].error) for kind in COARSE if kind in found}


def dispatch(name: str, kind: Kind, rounds: int, rows: Rows) -> Figures:
    """Images without a bundle's name, over the same images with one; masks begin where images are dispatched."""
    from training.domains import fit  # importing scikit-learn takes a second

    backbone = synthetic.load(name)
    stage, pixels = len(backbone.stages) // 2, pictures(backbone, 4 * BATCH)
    bundles = [synthetic.single(backbone, str(i), i, mask_from=stage) for i in range(BUNDLES)]
    engine = engine_of(bundles[:1], synthetic.mask_bytes(backbone), kind)
    executor = engine.executor(bundles[0])
    items = [synthetic.item(engine, "0", image) for image in pixels]
    batches = [stack(items[i : i + BATCH], DEVICE) for i in range(0, len(items), BATCH)]
    features = torch.cat([pooled(executor.run(x, 0, stage)) for x in batches]).cpu()
    order = features.mean(dim=1).argsort()  # so that domains differ
    engine = Engine(synthetic.mask_bytes(backbone), DEVICE, executor=kind)
    for bundle, own in zip(bundles, order.chunk(BUNDLES), strict=True):
        card = bundle.card.model_copy(update={"domain": DomainCard(stage=stage)})
        engine.add(replace(bundle, card=card, domain=fit(features[own])))
    table = engine.dispatch_table()
    assert not hasattr(table, "kind"), table
    named = [synthetic.item(engine, str(i % BUNDLES), pixels[i]) for i in range(BATCH)]
    unnamed = [OpenItem(table, synthetic.QUICK, (pixels[i],)) for i in range(BATCH)]
    taken = seconds({"named": lambda run: engine.run(named), "unnamed": lambda run: engine.run(unnamed)}, rounds, 8)
    for way, each in taken.items():
        rows.add(f"{BUNDLES} bundles, {way}", figure([1000 * s / BATCH for s in each]), "ms an image")
    return {"named_over_dispatched_gpu": figure(ratios(taken["named"], taken["unnamed"]))}


def deferral(name: str, kind: Kind, rounds: int, rows: Rows) -> Figures:
    """A quarter of the images again at twice the side, over all of them at that side."""
    backbone = synthetic.load(name)
    bundle = two_sizes(backbone)
    engine = engine_of([bundle], synthetic.mask_bytes(backbone), kind)
    held = engine.find(bundle.name)
    assert isinstance(held, Bundle) and held.larger is not None
    sizes = [part.preprocessing.size for part in held.parts]
    small, large = (torch.zeros(3, size, size, dtype=torch.uint8) for size in sizes)
    options = replace(synthetic.QUICK, labels=1)
    both = [Resolution("adaptive", larger=large if i % 4 == 0 else None) for i in range(BATCH)]
    first = [Item(held, "dispatcher", options, small, resolution=each) for each in both]
    full = [Item(held.larger, "dispatcher", options, large, resolution=Resolution("full", 4)) for _ in range(BATCH)]
    fast = [Item(held, "dispatcher", options, small, resolution=Resolution("fast")) for _ in range(BATCH)]
    ways: Ways = {
        way: lambda run, items=items: engine.run(items)  # type: ignore[misc]
        for way, items in (("fast", fast), ("adaptive", first), ("full", full))
    }
    taken = seconds(ways, rounds, 8)
    for way, each in taken.items():
        rows.add(f"two input sizes, {way}", figure([1000 * s / BATCH for s in each]), "ms an image")
    return {
        "adaptive_over_full_gpu": figure(ratios(taken["adaptive"], taken["full"])),
        "adaptive_over_fast_gpu": figure(ratios(taken["adaptive"], taken["fast"])),
    }


def two_sizes(backbone: Backbone) -> Bundle:
    """A bundle at half the backbone's input size, whose images all are unsure, and at its whole size."""
    single = synthetic.single(backbone, "two", 0)
    draw = torch.Generator().manual_seed(0)
    head = Linear(torch.randn(10, synthetic.DIM, generator=draw) / 50, torch.zeros(10))
    size = single.preprocessing.size
    small = Preprocessing.of(backbone.config, size // 2, 1.0)
    classes = [str(i) for i in range(10)]
    card = single.card.model_copy(update={"format": 2, "classes": classes, "preprocessing": small.to_json()})
    about = DeferralCard(
        threshold=1.0, lose=0.0, share=0.25, preprocessing=single.preprocessing.to_json(), mask=card.masks[0]
    )
    card = card.model_copy(update={"deferral": about})
    of_larger = card.larger()
    assert of_larger is not None
    larger = replace(single, card=of_larger, linear={"dispatcher": head})
    return replace(larger, card=card, preprocessing=small, larger=larger)


def loading(name: str, kind: Kind, rounds: int, rows: Rows) -> Figures:
    """Seconds to add a bundle: the first of its shape, for which graphs are captured, and others, as on demand."""
    backbone = synthetic.load(name)
    engine = Engine(synthetic.mask_bytes(backbone), DEVICE, executor=kind)
    engine.add(synthetic.single(backbone, "other", 0, mask_from=len(backbone.stages) // 2))
    taken: list[float] = []
    before = engine.stats()["backbone_bytes"]
    for i in range(rounds + 1):
        bundle = synthetic.single(backbone, str(i), i)
        begin = time.perf_counter()
        engine.add(bundle)
        wait()
        taken.append(time.perf_counter() - begin)
    graphs = engine.stats()["backbone_bytes"] - before
    rows.add("add the first bundle of a shape", single(taken[0]), "s", graphs)
    rows.add("add another", figure(taken[1:]), "s")
    return {"load_first_seconds_gpu": single(taken[0]), "load_next_seconds_gpu": figure(taken[1:])}
