"""Shared by the experiments: presets, runs identified by their recipe, and measures of embeddings.

    python -m training.experiments.prototypes                                  # --preset small: minutes, two cores
    python -m training.experiments.prototypes --preset paper --price-per-hour 2
    python -m training.experiments.prototypes --data photos/ --set steps=50 --set limit=500

A run's folder is named after its recipe, so experiments share what they have in common. An interrupted experiment
resumes.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from torch import Tensor

from cascade.errors import CascadeError
from cascade.model.masks import Mask
from training import dispatcher, embed, evaluate, fusion
from training.cli import Watch, stage, start
from training.cost import Cost
from training.data import dataset
from training.data.dataset import Images
from training.experiments import report
from training.experiments.report import Table
from training.recipe import Recipe, paper
from training.run import Run, begin

Pair = tuple[np.ndarray, np.ndarray]  # features of the training and of the held-out images, float32 [N, F], [M, F]
SWAV = "swav_800ep_pretrain.pth.tar"
SEEDS = {"small": 3, "paper": 1}  # the paper ran almost everything once

# Real images and a real backbone; masks on the last block only, with cached inputs: minutes on two cores.
SMALL = Recipe(
    "cifar10",
    limit=2000,
    test_limit=1000,
    size=64,
    mask_from="blocks.6",
    objective="swav",
    adapt="mask",
    clusters=5,
    local_crops=0,
    draws=2,
    steps=200,
    expert_steps=60,
    lr=0.05,
    router="centroid",  # every expert gets images, even if there are few
    dim=128,
)
# Masks on four fifths of the weights, for experiments that need it; fewer and smaller steps. Earlier stages and
# BatchNorm stay frozen: in so few steps, updating its statistics, at learning rate zero, costs 14 points of k-NN.
DEEP = {
    "mask_from": "blocks.5",
    "draws": 0,
    "limit": 1000,
    "batch": 32,
    "steps": 80,
    "expert_steps": 20,
    "lr": 0.05,
}
# The published settings (method.md §1-2); steps follow from epochs and the number of images.
PAPER = replace(paper("cifar100"), source=f"file:{SWAV}")
FEWER_EPOCHS = {"inatloc500": 54}  # where the paper uses fewer than elsewhere


@dataclass
class Lab:
    """The working environment of one experiment.

    Attributes:
        folder: for results, with the runs below it.
        preset: ``small`` or ``paper``.
        recipe: the common recipe of all runs.
        data: names or folders of the data sets.
        seeds: each run is repeated with every seed.
        epochs: length of a training in epochs of the data set; 0: the recipe's steps.
        notes: what could not be run, and why.
    """

    folder: Path
    preset: str
    recipe: Recipe
    data: tuple[str, ...]
    seeds: tuple[int, ...]
    watch: Watch
    epochs: float = 0
    notes: list[str] = field(default_factory=list)

    @property
    def small(self) -> bool:
        return self.preset == "small"

    def sets(self) -> Iterator[str]:
        """The available data sets; missing ones are noted, with how to get them."""
        available = False
        for name in self.data:
            try:
                dataset.load(name, "test", 1)
            except (CascadeError, OSError) as error:
                self.notes.append(f"not run: {error}")
                continue
            available = True
            yield name
        if not available:
            raise CascadeError(f"none of the data sets is there ({'; '.join(self.notes)})")

    def run(self, name: str = "", seed: int = 0, variant: str = "", epochs: float | None = None, **changes: Any) -> Run:
        """The run on data set ``name`` with these changes to the common recipe, which identify it.

        ``variant`` names a difference that is not part of the recipe; ``epochs`` overrides the lab's, if it has any.
        """
        recipe = replace(self.recipe, data=name or self.data[0], seed=seed, **changes)
        if self.epochs:
            wanted = epochs or FEWER_EPOCHS.get(name_of(recipe.data)) or self.epochs
            images = len(dataset.load(recipe.data, "train", recipe.limit or None, recipe.data_seed))
            steps = max(1, round(min(self.epochs, wanted) * images / recipe.batch))
            recipe = replace(recipe, steps=steps, expert_steps=steps)
        key = hashlib.sha256(json.dumps([asdict(recipe), variant]).encode()).hexdigest()[:12]
        return begin(self.folder / "runs" / f"{name_of(recipe.data)}-{key}", recipe, self.watch)

    def trained(self, name: str = "", seed: int = 0, **changes: Any) -> Run:
        """The same, with a trained dispatcher mask."""
        run = self.run(name, seed, **changes)
        dispatcher.train(run)
        return run

    def path(self, name: str) -> Path:
        """File name of a result: ``name``, the preset, and a suffix for figures."""
        stem, dot, suffix = name.partition(".")
        return self.folder / f"{stem}-{self.preset}{dot}{suffix}"

    def columns(self, name: str, values: Mapping[str, float]) -> dict[str, float]:
        """Prefix columns with the data set's name."""
        return {f"{name_of(name)} {c}": v for c, v in values.items()}

    def baselines(self, table: Table, name: str, run: Run) -> None:
        """Add the baselines of every mask: frozen backbone, learning rate zero, and pixels."""
        dispatcher.zero_rate(run)
        table.add("frozen backbone", self.columns(name, knn(run, pair(run, None))))
        table.add("learning rate zero", self.columns(name, knn(run, pair(run, run.mask("zero-rate", run.mask_from)))))
        table.add("pixels, 8 x 8", self.columns(name, knn(run, (pixels(run.images), pixels(run.held_out)))))


def pair(run: Run, mask: Mask | None) -> Pair:
    """Features under a mask, or of the plain backbone."""
    both = []
    for images in (run.images, run.held_out):
        inputs = embed.batches(images, run.preprocessing)
        both.append(embed.blocks(run.executor, [mask], inputs)[0] if mask else embed.frozen(run.executor, inputs))
    return both[0], both[1]


def labels(run: Run) -> tuple[Tensor, Tensor]:
    """Classes of the training and of the held-out images, int64."""
    if run.images.labels is None or run.held_out.labels is None:
        raise CascadeError(f"{run.recipe.data} has no class folders, and accuracies need them")
    return torch.from_numpy(run.images.labels), torch.from_numpy(run.held_out.labels)


def knn(run: Run, features: Pair, *, eigenvalue: bool = False) -> dict[str, float]:
    """k-NN accuracy in %, plain and whitened; with ``eigenvalue`` also whitened as the paper's text says."""
    known, truth = labels(run)
    k, dim = run.recipe.neighbors, fusion.dimension(run.recipe, features[0].shape[1], len(features[0]))
    bank, queries = map(torch.from_numpy, features)
    out = {"k-NN": 100 * evaluate.knn(bank, queries, known, truth, k)}
    for way, column in (("scale", "k-NN whitened"), ("eigenvalue", "k-NN / eigenvalue"))[: 1 + eigenvalue]:
        out[column] = 100 * evaluate.knn(*_fused(features, dim, way, run.recipe.seed), known, truth, k)
    return out


def probe(run: Run, features: Pair, *, plain: bool = True) -> dict[str, float]:
    """Linear-probe accuracy in %, plain (slow for wide features) and whitened."""
    known, truth = labels(run)
    dim = fusion.dimension(run.recipe, features[0].shape[1], len(features[0]))
    ways = {"probe": tuple(map(torch.from_numpy, features))} if plain else {}
    ways["probe whitened"] = _fused(features, dim, "scale", run.recipe.seed)
    return {column: 100 * evaluate.probe(x[0], x[1], known, truth) for column, x in ways.items()}


def _fused(features: Pair, dim: int, way: str, seed: int) -> tuple[Tensor, Tensor]:
    # In float32, not folded to half precision as in a bundle: division by eigenvalues exceeds its range.
    mean, basis = fusion.principal(features[0], dim, way, seed)
    bank, queries = (torch.from_numpy((x - mean) @ basis) for x in features)
    return bank, queries


def pixels(images: Images, side: int = 8) -> np.ndarray:
    """The images themselves, shrunk to ``side`` px: a baseline that every embedding should beat."""
    return dataset.cache(images, side).reshape(len(images), -1).astype(np.float32) / 255


def main(
    experiment: Callable[[Lab], list[Table]],
    small: Mapping[str, Any],
    paper: Mapping[str, Any],
    arguments: list[str] | None = None,
) -> None:
    """The command of an experiment: options, tables, cost.

    Args:
        small, paper: this experiment's changes to the preset: fields of the recipe, ``data`` (a list), ``seeds`` and
            ``epochs``.
    """

    def command(
        preset: Annotated[Literal["small", "paper"], typer.Option(help="Size of the experiment.")] = "small",
        seeds: Annotated[int, typer.Option(help="Runs of each kind; 3 by default, 1 for the paper's preset.")] = 0,
        out: Annotated[Path, typer.Option(help="Folder for results and runs.")] = Path("runs/paper"),
        data: Annotated[list[str] | None, typer.Option(help="Folder or published data set; may be repeated.")] = None,
        set_: Annotated[
            list[str] | None,
            typer.Option("--set", metavar="NAME=VALUE", help="Field of the recipe, such as steps=50; may be repeated."),
        ] = None,
        price_per_hour: Annotated[float, typer.Option(help="Price of a GPU, or of a machine without one.")] = 0.0,
    ) -> None:
        with stage() as watch, Cost(price_per_hour) as cost:
            changes = small if preset == "small" else paper
            lab = open_lab(preset, changes, watch, out=out, seeds=seeds, data=data or (), settings=set_ or ())
            tables = experiment(lab)
        facts = {
            "experiment": name,
            "preset": lab.preset,
            "seeds": len(lab.seeds),
            "data": " ".join(map(name_of, lab.data)),
        }
        recipe = {k: v for k, v in asdict(lab.recipe).items() if k not in ("data", "source", "seed")}
        print(report.write(lab.path(name), tables, facts | cost.facts() | {"recipe": recipe}, lab.notes))

    name = Path(experiment.__code__.co_filename).stem
    command.__module__ = experiment.__module__  # the help is its docstring
    start(command, arguments)


def open_lab(
    preset: Literal["small", "paper"],
    changes: Mapping[str, Any],
    watch: Watch,
    *,
    out: Path,
    seeds: int = 0,
    data: Sequence[str] = (),
    settings: Sequence[str] = (),
) -> Lab:
    """The preset with an experiment's changes, overridden by the command line."""
    base = SMALL if preset == "small" else PAPER
    chosen = dict(changes) | dict(map(_setting, settings))
    names = tuple(data) or tuple(chosen.pop("data", (base.data,)))
    chosen.pop("data", None)
    seeds = seeds or chosen.pop("seeds", SEEDS[preset])
    chosen.pop("seeds", None)
    epochs = chosen.pop("epochs", 0)
    epochs = 0 if any(s.startswith("steps=") for s in settings) else epochs
    recipe = replace(base, **chosen)
    kind, _, path = recipe.source.partition(":")
    if path == SWAV and kind == "file" and not Path(path).exists():
        raise CascadeError(
            f"the paper's ResNet-50 is not here: get https://dl.fbaipublicfiles.com/deepcluster/{SWAV}"
            f" into this folder, or give --set backbone=NAME --set source=SOURCE"
        )
    return Lab(out, preset, recipe, names, tuple(range(seeds)), watch, epochs)


def _setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    kinds = {f.name: type(f.default) for f in fields(Recipe)} | {"epochs": float}
    if name not in kinds or not value:
        raise CascadeError(f"--set {text}: give NAME=VALUE, NAME one of {', '.join(sorted(kinds))}")
    kind: Any = kinds[name]
    try:
        if kind is bool:
            return name, {"true": True, "false": False}[value.lower()]
        return name, tuple(map(float, value.split(","))) if kind is tuple else kind(value)
    except (KeyError, ValueError):
        raise CascadeError(f"--set {text}: {value} is no {kind.__name__}") from None


def name_of(source: str) -> str:
    """The name of a data set, without its path on this machine."""
    return Path(source).name
