"""Batches that mix masks: B = 32 images, against copies and against common alternatives."""

import numpy as np

from benchmarks.report import Figure, Rows, figure, single
from benchmarks.serving import baselines
from benchmarks.serving.baselines import Batch
from benchmarks.subprocesses import peers, ratios, rounds

BATCH, HELD = 32, 8
Figures = dict[str, Figure]


def uniform(models: int, count: int, seed: int = 0) -> list[Batch]:
    """``count`` batches for models drawn uniformly."""
    draw = np.random.default_rng(seed)
    return [draw.integers(models, size=BATCH).tolist() for _ in range(count)]


def zipf(models: int, count: int, seed: int = 0, size: int = BATCH) -> list[Batch]:
    """``count`` batches for models drawn from a Zipf distribution with exponent 1.5."""
    draw, weight = np.random.default_rng(seed), np.arange(1, models + 1) ** -1.5
    return [draw.choice(models, size, p=weight / weight.sum()).tolist() for _ in range(count)]


def against_copies(name: str, what: str, models: int, works: list[Batch], goal: str, same: bool, rows: Rows) -> Figures:
    """Throughput over resident copies in their fastest executor, and in ours if they fit in memory."""
    builds = {"masks": (baselines.ours, name, models, HELD), "copies": (baselines.static_copies, name, models)}
    if same:
        builds["same"] = (baselines.ours, name, models, models)
    with peers(builds) as running:
        seconds = rounds(running, works, warm=2)
        memory = {way: peer.grown() for way, peer in running.items()}
    texts = {
        "masks": f"{models} masks, {HELD} materialized",
        "copies": f"{models} static ONNX Runtime sessions",
        "same": f"{models} masks, all materialized",
    }
    for way, taken in seconds.items():
        rows.add(f"{what}: {texts[way]}", figure([1000 * s / BATCH for s in taken]), "ms an image", memory[way])
    out = {what: figure(ratios(seconds["copies"], seconds["masks"]), goal)}
    if same:
        out[f"{what}_same_executor"] = figure(ratios(seconds["same"], seconds["masks"]))
    return out | {f"{what}_memory_of_copies": single(memory["copies"] / memory["masks"])}


def against_today(name: str, works: list[Batch], models: int, rows: Rows) -> Figures:
    """Throughput and memory over loading a state_dict whenever the model changes, and over masking hooks."""
    builds = {
        "masks": (baselines.ours, name, models, HELD),
        "load_state_dict": (baselines.files, name, models),
        "hooks": (baselines.hooks, name, models),
    }
    with peers(builds) as running:
        seconds = rounds(running, works, warm=2)
        memory = {way: peer.grown() for way, peer in running.items()}
    texts = {
        "masks": f"{models} masks, {HELD} materialized",
        "load_state_dict": f"load_state_dict per group, {models} files in the page cache",
        "hooks": f"forward hooks, {models} masks as bool tensors",
    }
    out: Figures = {}
    for way, taken in seconds.items():
        rows.add(texts[way], figure([1000 * s / BATCH for s in taken]), "ms an image", memory[way])
        if way != "masks":
            out[f"over_{way}"] = figure(ratios(taken, seconds["masks"]), "> 1")
            out[f"over_{way}_memory"] = single(memory[way] / memory["masks"])
    return out


def identical(name: str, count: int, rows: Rows) -> Figures:
    """A single mask through the engine, over the unmasked backbone in the same executor."""
    with peers({"masks": (baselines.ours, name, 1, 1), "plain": (baselines.unmasked, name)}) as running:
        seconds = rounds(running, [[0] * BATCH] * count, warm=1)
    rows.add("one mask throughout", figure([1000 * s / BATCH for s in seconds["masks"]]), "ms an image")
    rows.add("the unmasked backbone", figure([1000 * s / BATCH for s in seconds["plain"]]), "ms an image")
    return {"identical_over_unmasked": figure(ratios(seconds["plain"], seconds["masks"]), ">= 0.97")}
