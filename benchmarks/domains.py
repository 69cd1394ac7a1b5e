"""Dispatch between bundles of different domains: does it find the right one, what does it cost, and what is it worth?

    python -m benchmarks.domains                   # everything; resumes in runs/domains
    python -m benchmarks.domains --steps 100       # shorter trainings
    python -m benchmarks.domains --converged --seeds 3     # as many steps as cascade train chooses, three seeds

Six domains from four data sets (``python -m benchmarks.datasets cifar10 fashion-mnist groceries digits``), each a
folder of class folders, as a customer would have. ``cascade train --labels`` trains a separate bundle per domain. The
controls are one bundle trained on all domains, and one mask trained on each domain in turn, for the same total steps;
with the true domain named, fine-tuned copies of the same steps, and heads on the frozen backbone; and RanPAC (random
features and one ridge classifier for all classes, McDonnell et al. 2023). All test images are mixed, and no bundle is
named.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.table import Table
from sklearn.metrics import roc_auc_score

from benchmarks.domain_controls import fine_tuned, ranpac, sequential
from benchmarks.domain_sets import (
    BATCH,
    DOMAINS,
    SIZE,
    TRAIN,
    HeldOut,
    export_domain,
    features,
    held_out,
    run_of,
    train,
)
from benchmarks.report import Figure, figure, report, single
from cascade import Engine, Options, Prediction
from cascade.bundle.format import Bundle
from cascade.engine.dispatch_table import DispatchTable
from cascade.engine.executors import Executor
from cascade.model.domain import Domain, Domains
from training.cli import Watch, watching

ROUNDS, MANY = 9, 1000
NAMED, AUTO, JOINT = "own bundle, named (oracle)", "own bundle, dispatched", "one bundle, trained jointly"
IN_TURN, COPIES = "one mask, trained on each domain in turn", "fine-tuned copies, named"
FROZEN, RANPAC = "heads on the frozen backbone, named", "RanPAC"
ROUTED, BETWEEN, UNKNOWN = "sent to its bundle", "sent to its data set", "AUROC as unknown"
Shares = dict[str, dict[str, float]]
"""By method, in [0, 1] for each domain."""


def accuracy(engine: Engine, sets: dict[str, HeldOut], bundle: str | None, joint: bool = False) -> dict[str, float]:
    """Accuracy on each domain. bundle: ``auto``, the joint one, or None for the domain's own, named."""
    shares = {}
    for name, own in sets.items():
        answers = engine.predict(own.images, Options(bundle or name, labels=1, neighbors=0))
        right = 0
        for answer, label in zip(answers, own.classes, strict=True):
            if isinstance(answer, Prediction) and answer.labels:
                where = answer.bundle == name or joint
                right += where and answer.labels[0].name == (f"{name} {label}" if joint else label)
        shares[name] = right / len(own.images)
    return shares


def route_shares(engine: Engine, sets: dict[str, HeldOut], *, same_data: bool = False) -> dict[str, float]:
    """Share of each domain's images that are sent to its bundle (``same_data``: to one of the same data set)."""

    def right(name: str, bundle: str) -> bool:
        return bundle == name or (same_data and DOMAINS[bundle][0] == DOMAINS[name][0])

    shares = {}
    for name, own in sets.items():
        answers = engine.predict(own.images, Options("auto", labels=0, neighbors=0))
        shares[name] = sum(isinstance(a, Prediction) and right(name, a.bundle) for a in answers) / len(own.images)
    return shares


def unknown(table: DispatchTable, executor: Executor, sets: dict[str, HeldOut]) -> dict[str, float]:
    """AUROC of detecting each domain's images as unknown if its own bundle is missing."""
    (space,) = table.spaces
    names = [bundle.name for bundle in space.bundles]
    found = {n: features(executor, space.bundles[0], own.images, space.stage) for n, own in sets.items()}
    aurocs = {}
    for left_out in names:
        rest = [b for b in space.bundles if b.name != left_out]
        known = Domains.of([b.domain for b in rest if b.domain is not None])
        strange, foreign = [], []
        for name, x in found.items():
            scores = known.scores(x)
            best = scores.argmax(dim=1, keepdim=True)
            strange.append(known.strangeness(known.distance(x, scores)).gather(1, best)[:, 0])
            foreign.append(np.full(len(x), name == left_out))
        aurocs[left_out] = float(roc_auc_score(np.concatenate(foreign), torch.cat(strange).numpy()))
    return aurocs


def forgotten(engine: Engine, sets: dict[str, HeldOut], extra: Bundle) -> int:
    """Embeddings (of 1,000 images, bundles named) with a changed bit after 20 bundles are added and removed."""
    asked = [(name, image) for name, own in sets.items() for image in own.images][:: max(1, 2100 // 1000)][:1000]

    def ask() -> list[bytes]:
        wishes = [Options(name, embedding=True, neighbors=0) for name, _ in asked]
        answers = engine.predict([image for _, image in asked], wishes)
        return [a.embedding.tobytes() for a in answers if isinstance(a, Prediction) and a.embedding is not None]

    before = ask()
    for n in range(20):
        engine.add(replace(extra, name=f"extra-{n}"))
    during = ask()
    for n in range(20):
        engine.remove(f"extra-{n}", "1")
    after = ask()
    assert len(before) == len(during) == len(after) == len(asked)
    return sum(not a == b == c for a, b, c in zip(before, during, after, strict=True))


def costs(engine: Engine, sets: dict[str, HeldOut]) -> tuple[list[float], list[float], list[float]]:
    """Passes by time, interleaved: a mixed batch dispatched, the same one named, and dispatch over 1,000 bundles."""
    mixed = [(name, own.images[i]) for i in range(BATCH) for name, own in sets.items() if i < len(own.images)][:BATCH]
    open_items = [engine.prepare(image, Options("auto", labels=1, neighbors=0)) for _, image in mixed]
    named = [engine.prepare(image, Options(name, labels=1, neighbors=0)) for name, image in mixed]
    table = engine.dispatch_table()
    assert isinstance(table, DispatchTable)
    (space,) = table.spaces
    executor = engine.executor(space.bundles[0])
    x = torch.randn(BATCH, 3, SIZE, SIZE)
    domains = Domains.of([_jittered(space.bundles[i % len(space.bundles)].domain, i) for i in range(MANY)])
    activations = torch.randn(BATCH, len(domains.metric))

    def plain() -> None:
        executor.swap(None)
        executor.run(x)

    def search() -> None:
        scores = domains.scores(activations)
        domains.strangeness(domains.distance(activations, scores))
        scores.softmax(dim=1).topk(5)

    ways = {
        "plain": plain,
        "auto": lambda: engine.run(open_items),  # type: ignore[arg-type]
        "named": lambda: engine.run(named),  # type: ignore[arg-type]
        "search": search,
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    with torch.inference_mode():
        for nth in range(ROUNDS + 1):
            for way, work in ways.items():
                start = time.perf_counter()
                work()
                if nth:  # the first one warms up
                    times[way].append(time.perf_counter() - start)
    plain_times = times.pop("plain")
    auto, named_times, share = ([t / p for t, p in zip(own, plain_times, strict=True)] for own in times.values())
    return auto, named_times, share


def _jittered(domain: Domain | None, seed: int) -> Domain:
    assert domain is not None
    noise = 0.1 * torch.randn(domain.prototypes.shape, generator=torch.Generator().manual_seed(seed))
    return Domain((domain.prototypes.float() + noise).half(), domain.scatter, domain.samples)


def measure(folder: Path, steps: int, seed: int, watch: Watch) -> tuple[Shares, Engine, dict[str, HeldOut]]:
    """Accuracy of every method, and the shares of ``ROUTING``; also the engine of all bundles, and the test images.

    Args:
        steps: of each domain; -1: the default of ``cascade train`` for the number of images, also for all domains.
    """
    names = list(DOMAINS)
    frozen = {name: train(name, folder, 0, seed, watch, frozen=True) for name in names}
    own = {name: train(name, folder, steps, seed, watch) for name in names}
    total = steps if steps < 0 else steps * len(names)
    joint = train("joint", folder, total, seed, watch)
    runs = {name: run_of(name, folder, steps, seed, watch) for name in names}
    sets = {name: held_out(name, folder) for name in names}
    engine, controls = Engine(), Engine()
    for bundle in own.values():
        engine.add(bundle)
    for bundle in (*frozen.values(), joint):
        controls.add(bundle)
    table = engine.dispatch_table()
    assert isinstance(table, DispatchTable)
    executor = engine.executor(own[names[0]])
    in_turn = run_of("joint", folder, total, seed, watch, "-sequential")
    return (
        {
            NAMED: accuracy(engine, sets, None),
            AUTO: accuracy(engine, sets, "auto"),
            JOINT: accuracy(controls, sets, "joint", joint=True),
            IN_TURN: sequential(in_turn, {name: run.steps for name, run in runs.items()}),
            COPIES: fine_tuned(runs),
            FROZEN: accuracy(controls, sets, None),
            RANPAC: ranpac(executor, joint, folder, sets, seed),
            ROUTED: route_shares(engine, sets),
            BETWEEN: route_shares(engine, sets, same_data=True),
            UNKNOWN: unknown(table, executor, sets),
        },
        engine,
        sets,
    )


def main(
    folder: Annotated[Path, typer.Option("--run", help="Folder of the runs.")] = Path("runs/domains"),
    steps: Annotated[
        int, typer.Option(help="Of each domain's training; the joint one gets all of them together.")
    ] = 200,
    converged: Annotated[
        bool, typer.Option("--converged", help="Instead of --steps, those that cascade train chooses.")
    ] = False,
    seeds: Annotated[int, typer.Option(help="Number of seeds.", min=1)] = 1,
) -> None:
    """Train a bundle for each domain and the controls, and dispatch all test images between them."""
    folder, steps = (folder / "converged", -1) if converged else (folder, steps)
    for name in DOMAINS:
        if not (folder / name / "test").exists():
            export_domain(name, folder)
    with watching() as watch:
        measured = [measure(folder, steps, seed, watch) for seed in range(seeds)]
    found = [shares for shares, _, _ in measured]
    _, engine, sets = measured[0]
    bundle = engine.loaded[0]
    changed = forgotten(engine, sets, train(bundle.name, folder, steps, 0, Watch(None)))
    auto, named, share = costs(engine, sets)
    title = f"{'default' if converged else steps} steps a domain, {TRAIN} images at most, seeds: {seeds}"
    table = Table("accuracy %", "mean", *DOMAINS, title=title)
    for way in found[0]:
        table.add_row(way, _percent(np.mean([*means(found, way)])), *_percents(found, way))
    oracle = [a / b for a, b in zip(means(found, AUTO), means(found, NAMED), strict=True)]
    figures = {
        "route_accuracy": figure([*means(found, ROUTED)], ">= 0.98"),
        "route_accuracy_between_data_sets": figure([*means(found, BETWEEN)], ">= 0.98"),
        "auto_over_oracle": figure(oracle, ">= 0.98"),
        "auto_over_joint": over(found, JOINT, ">= 0"),
        "auto_over_ranpac": over(found, RANPAC, "> 0"),
        "auto_over_sequential": over(found, IN_TURN, ">= 20"),
        "auto_over_fine_tuned_named": over(found, COPIES),
        "auto_over_frozen_named": over(found, FROZEN),
        "auto_passes": figure(auto, "<= 1.1"),
        "named_passes": figure(named),
        "forgotten": single(changed, "<= 0"),
        "unknown_auroc": figure([*means(found, UNKNOWN)], ">= 0.95"),
        "dispatch_share_1000": figure(share, "<= 0.02"),
    }
    name = "domains-converged" if converged else "domains"
    report(name, figures, table, executor=type(engine.executor(bundle)).__name__)


def means(found: list[Shares], way: str) -> Iterator[float]:
    """The mean over the domains, for each seed."""
    return (float(np.mean([*shares[way].values()])) for shares in found)


def over(found: list[Shares], way: str, goal: str | None = None) -> Figure:
    """Points by which dispatched bundles are better, for each seed."""
    return figure([100 * (a - b) for a, b in zip(means(found, AUTO), means(found, way), strict=True)], goal)


def _percent(share: float | np.floating[Any]) -> str:
    return f"{100 * float(share):.1f}"


def _percents(found: list[Shares], way: str) -> list[str]:
    """The mean over the seeds, for each domain."""
    return [_percent(np.mean([shares[way][name] for shares in found])) for name in found[0][way]]


if __name__ == "__main__":
    typer.run(main)
