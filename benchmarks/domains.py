"""Dispatch between bundles of different domains: does it find the right one, what does it cost, and what is it worth?

    python -m benchmarks.domains                   # everything; resumes in runs/domains
    python -m benchmarks.domains --steps 100       # shorter trainings
    python -m benchmarks.domains --converged --seeds 3     # as many steps as cascade train chooses, three seeds
    python -m benchmarks.domains --backbone mobilenetv2_100

Eight domains from five data sets (``python -m benchmarks.datasets``), each a folder of class folders, as a customer
would have. They arrive one by one: ``cascade train --labels`` trains a separate bundle for each, and all test images of
the domains so far are mixed, without naming a bundle. The controls are one mask trained on each domain in turn, RanPAC
(random features and one ridge classifier for all classes, McDonnell et al. 2023), and one bundle trained on all domains
together, for the same total steps; with the true domain named, fine-tuned copies of the same steps, and heads on the
frozen backbone.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from sklearn.metrics import roc_auc_score

from benchmarks import domain_figures, synthetic
from benchmarks.accuracy import BACKBONES
from benchmarks.domain_controls import Shares, fine_tuned, ranpac, sequential
from benchmarks.domain_figures import (
    AUTO,
    BETWEEN,
    COPIES,
    FROZEN,
    IN_TURN,
    JOINTLY,
    NAMED,
    RANPAC,
    ROUTED,
    ROUTED_TOP2,
    SEARCH,
    SEARCH_RESNET50,
    TOP2,
    UNKNOWN,
    Measured,
)
from benchmarks.domain_sets import (
    BATCH,
    DOMAINS,
    JOINT,
    SIZE,
    STAGE,
    TRAIN,
    HeldOut,
    Setting,
    activations,
    export_domain,
)
from cascade import Engine, Options, Prediction
from cascade.bundle.format import Bundle
from cascade.engine.dispatch_table import DispatchTable, Space
from cascade.engine.executors import Executor
from cascade.engine.executors.selection import choose
from cascade.engine.results import DispatchMode
from cascade.engine.weight_cache import WeightCache
from cascade.model.domain import MAX_WIDTH, Domain, Domains
from training.cli import watching

ROUNDS, MANY = 9, 1000


def accuracy(engine: Engine, sets: dict[str, HeldOut], bundle: str | None, dispatch: DispatchMode = "image") -> Shares:
    """Accuracy on each domain.

    Args:
        bundle: ``auto``, that of all domains (``JOINT``), or None for the domain's own, named.
    """
    shares = {}
    for name, own in sets.items():
        answers = engine.predict(own.images, Options(bundle or name, labels=1, neighbors=0, dispatch=dispatch))
        right = 0
        for answer, label in zip(answers, own.classes, strict=True):
            if isinstance(answer, Prediction) and answer.labels:
                wanted = f"{name} {label}" if bundle == JOINT else label
                right += answer.bundle in (name, JOINT) and answer.labels[0].name == wanted
        shares[name] = right / len(own.images)
    return shares


def arrive(engine: Engine, bundles: dict[str, Bundle], sets: dict[str, HeldOut]) -> tuple[list[Shares], list[float]]:
    """Add the bundles one by one.

    Returns:
        After each arrival, the accuracy on each domain so far, dispatched; and the seconds until the first answer.
    """
    arrivals, seconds = [], []
    for nth, (name, bundle) in enumerate(bundles.items()):
        began = time.perf_counter()
        engine.add(bundle)
        engine.predict(sets[name].images[:1], Options("auto", labels=1, neighbors=0))
        seconds.append(time.perf_counter() - began)
        arrivals.append(accuracy(engine, {known: sets[known] for known in list(bundles)[: nth + 1]}, "auto"))
    return arrivals, seconds


def route_shares(
    engine: Engine, sets: dict[str, HeldOut], dispatch: DispatchMode = "image", *, same_data: bool = False
) -> Shares:
    """Share of each domain's images that are sent to its bundle (``same_data``: to one of the same data set)."""

    def right(name: str, bundle: str) -> bool:
        return bundle == name or (same_data and DOMAINS[bundle][0] == DOMAINS[name][0])

    shares = {}
    for name, own in sets.items():
        answers = engine.predict(own.images, Options("auto", labels=1, neighbors=0, dispatch=dispatch))
        shares[name] = sum(isinstance(a, Prediction) and right(name, a.bundle) for a in answers) / len(own.images)
    return shares


def unknown(engine: Engine, sets: dict[str, HeldOut]) -> Shares:
    """AUROC of detecting each domain's images as unknown if its own bundle is missing."""
    space, executor = the_space(engine)
    found = {n: activations(executor, space.preprocessing, own.images, space.stage) for n, own in sets.items()}
    aurocs = {}
    for left_out in sets:
        known = Domains.of([target.domain for target in space.targets if target.name != left_out])
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
    every = [(name, image) for name, own in sets.items() for image in own.images]
    asked = every[:: max(1, len(every) // 1000)][:1000]

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


def costs(engine: Engine, controls: Engine, sets: dict[str, HeldOut]) -> dict[str, list[float]]:
    """Time of a mixed batch by method, in plain passes; and of dispatch over 1,000 bundles."""
    mixed = [(name, own.images[i]) for i in range(BATCH) for name, own in sets.items() if i < len(own.images)][:BATCH]
    space, executor = the_space(engine)
    ways = {SEARCH: search([target.domain for target in space.targets])}
    for way, own, bundle in (
        (AUTO, engine, "auto"),
        (TOP2, engine, "auto"),
        (NAMED, engine, None),
        (JOINTLY, controls, JOINT),
        (FROZEN, controls, None),
    ):
        wish = Options(labels=1, neighbors=0, dispatch="top2" if way == TOP2 else "image")
        items = [own.prepare(image, replace(wish, bundle=bundle or name)) for name, image in mixed]
        ways[way] = partial(own.run, items)  # type: ignore[arg-type]
    return in_passes(executor, SIZE, ways, ROUNDS)


def costs_of_search(backbone: str, size: int, rounds: int = 3) -> dict[str, list[float]]:
    """Time of dispatch over 1,000 bundles of a backbone with random weights, in its plain passes."""
    random = torch.Generator().manual_seed(0)
    domain = Domain(
        torch.randn(16, MAX_WIDTH, generator=random).half(),
        torch.eye(MAX_WIDTH)[tuple(torch.tril_indices(MAX_WIDTH, MAX_WIDTH))].half(),
        torch.randn(64, MAX_WIDTH, generator=random).half(),
    )
    executor = choose(synthetic.load(backbone), WeightCache(0), size=size)
    return in_passes(executor, size, {SEARCH_RESNET50: search([domain])}, rounds)


def search(known: Sequence[Domain]) -> Callable[[], object]:
    """Dispatch a batch of features over 1,000 domains like these."""
    domains = Domains.of([_jittered(known[i % len(known)], i) for i in range(MANY)])
    features = torch.randn(BATCH, len(domains.metric))

    def once() -> None:
        scores = domains.scores(features)
        domains.strangeness(domains.distance(features, scores))
        scores.softmax(dim=1).topk(5)

    return once


@torch.inference_mode()
def in_passes(
    executor: Executor, size: int, ways: dict[str, Callable[[], object]], rounds: int
) -> dict[str, list[float]]:
    """Times over those of a plain pass of a batch, one for each round, interleaved."""
    x = torch.randn(BATCH, 3, size, size)
    times: dict[str, list[float]] = {way: [] for way in ways}
    for nth in range(rounds + 1):
        executor.swap(None)
        start = time.perf_counter()
        executor.run(x)
        base = time.perf_counter() - start
        for way, work in ways.items():
            start = time.perf_counter()
            work()
            if nth:  # the first one warms up
                times[way].append((time.perf_counter() - start) / base)
    return times


def the_space(engine: Engine) -> tuple[Space, Executor]:
    """The space of all bundles, and their executor."""
    table = engine.dispatch_table()
    assert isinstance(table, DispatchTable)
    (space,) = table.spaces
    return space, engine.executor(engine.loaded[0])


def _jittered(domain: Domain, seed: int) -> Domain:
    noise = 0.1 * torch.randn(domain.prototypes.shape, generator=torch.Generator().manual_seed(seed))
    return Domain((domain.prototypes.float() + noise).half(), domain.scatter, domain.samples)


def measure(setting: Setting) -> tuple[Measured, Engine, Engine]:
    """Everything about one seed; also the engines of all bundles and of the controls."""
    names = setting.names
    own = {name: setting.train(name) for name in names}
    frozen = {name: setting.train(name, frozen=True) for name in names}
    joint = setting.train(JOINT)
    runs = {name: setting.run(name) for name in names}
    sets = setting.held_out()
    engine, controls = Engine(), Engine()
    dispatched, seconds = arrive(engine, own, sets)
    for bundle in (*frozen.values(), joint):
        controls.add(bundle)
    copies = fine_tuned(runs)
    found = Measured(
        growing={
            NAMED: growing(accuracy(engine, sets, None)),
            AUTO: dispatched,
            IN_TURN: sequential(setting.run(JOINT, "-sequential"), {name: run.steps for name, run in runs.items()}),
            COPIES: growing({name: row.test for name, row in copies.items()}),
            FROZEN: growing(accuracy(controls, sets, None)),
            RANPAC: ranpac(setting.run(JOINT), names),
        },
        final={
            JOINTLY: accuracy(controls, sets, JOINT),
            TOP2: accuracy(engine, sets, "auto", "top2"),
            ROUTED: route_shares(engine, sets),
            ROUTED_TOP2: route_shares(engine, sets, "top2"),
            BETWEEN: route_shares(engine, sets, same_data=True),
            UNKNOWN: unknown(engine, sets),
        },
        bytes={
            AUTO: [setting.bytes(name) for name in names],
            COPIES: [row.bytes for row in copies.values()],
            FROZEN: [setting.bytes(name, frozen=True) for name in names],
        },
        seconds={
            AUTO: [setting.seconds(name) + more for name, more in zip(names, seconds, strict=True)],
            FROZEN: [setting.seconds(name, frozen=True) for name in names],
        },
    )
    return found, engine, controls


def growing(shares: Shares) -> list[Shares]:
    """The shares after each arrival, where no later domain changes those of an earlier one."""
    names = list(shares)
    return [{name: shares[name] for name in names[: n + 1]} for n in range(len(names))]


def main(
    folder: Annotated[Path, typer.Option("--run", help="Folder of the images and the runs.")] = Path("runs/domains"),
    steps: Annotated[
        int, typer.Option(help="Of each domain's training; the joint one gets all of them together.")
    ] = 200,
    converged: Annotated[
        bool, typer.Option("--converged", help="Instead of --steps, those that cascade train chooses.")
    ] = False,
    seeds: Annotated[int, typer.Option(help="Number of seeds.", min=1)] = 1,
    backbone: Annotated[str, typer.Option(help=f"One of {', '.join(BACKBONES)}.")] = [*BACKBONES][0],
    mask_from: Annotated[str, typer.Option(help="First masked stage; 0: all stages are masked.")] = STAGE,
) -> None:
    """Train a bundle for each domain and the controls, and dispatch all test images between them."""
    for name in DOMAINS:
        if not (folder / name / "test").exists():
            export_domain(name, folder)
    with watching() as watch:
        first = Setting(folder, tuple(DOMAINS), watch, -1 if converged else steps, 0, backbone, mask_from)
        (found, engine, controls), *others = (measure(replace(first, seed=seed)) for seed in range(seeds))
    sets = first.held_out()
    parts = [("domains", True), (backbone, backbone != [*BACKBONES][0]), (mask_from, mask_from != STAGE)]
    domain_figures.show(
        "-".join(part for part, shown in (*parts, ("converged", converged)) if shown),
        f"{'default' if converged else steps} steps a domain, {TRAIN} images at most, seeds: {seeds}",
        [found, *(each for each, *_ in others)],
        costs(engine, controls, sets) | costs_of_search("resnet50", 224),
        "<= 1.1" if mask_from == STAGE else "<= 1.6",
        forgotten(engine, sets, first.train(first.names[0])),
        type(the_space(engine)[1]).__name__,
    )


if __name__ == "__main__":
    typer.run(main)
