"""Stage 4: accuracy of the cascade on held-out images, with all its baselines and controls (paper §4).

python -m training.evaluate --run runs/cifar
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from cascade.bundle.inspect import percent
from cascade.model.fusion import Mode
from cascade.model.masks import difference
from training import fusion, heads
from training.cli import RUN, RunFolder, stage, start
from training.fusion import Fitted
from training.routing import router_of
from training.run import Run, resume, write_json

TEMPERATURE = 0.1
CONTROLS = {"equal-steps": "equal-steps dispatcher", "zero-rate": "learning-rate zero"}


@dataclass
class Features:
    """Features of the training and held-out images under every mask, and the clusters that they are routed to.

    Attributes:
        train, test: float32 [K + 1, N, F], the dispatcher's first.
        assigned, routed: clusters of the training and held-out images, int64 [N].
    """

    train: np.ndarray
    test: np.ndarray
    assigned: np.ndarray
    routed: np.ndarray

    def slots(self, mode: Mode, layout: str) -> tuple[np.ndarray, np.ndarray]:
        """The blocks that ``mode`` fuses, of the training and of the held-out images."""
        return (
            fusion.slots(mode, self.train, self.assigned, layout),
            fusion.slots(mode, self.test, self.routed, layout),
        )


def collect(run: Run) -> Features:
    """Embed both sets under all masks of the run, cached, and route them with the bundle's router."""
    train, test = run.blocks()
    router = router_of(run)
    if router is None:
        return Features(train, test, np.zeros(train.shape[1], int), np.zeros(test.shape[1], int))
    assigned = run.clusters["assigned"].numpy()
    routed = router.probabilities(torch.from_numpy(test[0])).argmax(dim=1).numpy()
    return Features(train, test, assigned, routed)


def evaluate(run: Run, features: Features) -> dict[str, Any]:
    """Measure k-NN and linear-probe accuracy of every method, whitened and not, and write ``evaluation.json``."""
    recipe = run.recipe
    result: dict[str, Any] = {
        "k": recipe.neighbors,
        "dim": fusion.dimension(recipe, run.backbone.features, len(run.images)),
        "bank_images": len(run.images),
        "held_out_images": len(run.held_out),
        "seed": recipe.seed,
        "experts_differ": [round(difference(run.dispatcher, e, run.backbone), 4) for e in run.experts],
    }
    if run.images.labels is None or run.held_out.labels is None:
        write_json(run.folder / "evaluation.json", result)
        return result
    labels = torch.from_numpy(run.images.labels), torch.from_numpy(run.held_out.labels)
    right: dict[str, Tensor] = {}
    for method, parts in methods(run, features):
        projection = fusion.fit(parts[0], result["dim"], "scale", recipe.seed)
        whitened = fusion.embed(projection, parts[0]), fusion.embed(projection, parts[1])
        plain = joined(parts[0]), joined(parts[1])
        result.setdefault("whitened", {})[method], right[method] = measure(*whitened, *labels, recipe.neighbors)
        result.setdefault("plain", {})[method], _ = measure(*plain, *labels, recipe.neighbors)
    if recipe.clusters > 1:
        frozen, own = (right[method].numpy() for method in ("frozen backbone", recipe.mode))
        result["clusters"] = by_cluster(frozen, own, features.routed, recipe.clusters)
    write_json(run.folder / "evaluation.json", result)
    return result


def measure(bank: Tensor, queries: Tensor, known: Tensor, truth: Tensor, k: int) -> tuple[dict[str, float], Tensor]:
    """k-NN and probe accuracy of embeddings, and the queries that k-NN answers correctly, bool [M].

    Args:
        bank: [N, D], with labels known [N]. queries: [M, D], with labels truth [M].
    """
    right = knn_right(bank, queries, known, truth, k)
    shares = {"knn": int(right.sum()) / len(right), "probe": probe(bank, queries, known, truth)}
    return {name: round(share, 4) for name, share in shares.items()}, right


def by_cluster(frozen: np.ndarray, own: np.ndarray, routed: np.ndarray, clusters: int) -> list[dict[str, Any]]:
    """Check each cluster for a loss against the frozen backbone, which a gain in the mean can hide.

    A cluster is worse if it loses more images than it gains, by over two standard errors of the difference. Images that
    both answer correctly, or both wrongly, do not count.

    Args:
        frozen, own: which held-out images are correct, bool [N]. routed: their clusters, int64 [N].
    """
    out: list[dict[str, Any]] = []
    for k in range(clusters):
        a, b = frozen[routed == k], own[routed == k]
        lost, won = int((a & ~b).sum()), int((b & ~a).sum())
        shares = {name: round(float(x.mean()), 4) if len(x) else None for name, x in (("frozen", a), ("own", b))}
        out.append({"held_out_images": len(a), **shares, "worse": lost - won > 2 * (lost + won) ** 0.5})
    return out


def knn(bank: Tensor, queries: Tensor, known: Tensor, truth: Tensor, k: int) -> float:
    """Cosine k-NN, weights exp(similarity / 0.1) (method.md §4): accuracy in [0, 1]."""
    return int(knn_right(bank, queries, known, truth, k).sum()) / len(queries)


def knn_right(bank: Tensor, queries: Tensor, known: Tensor, truth: Tensor, k: int) -> Tensor:
    """The queries that k-NN answers correctly, bool [M]."""
    classes = int(max(known.max(), truth.max())) + 1
    bank, right = normalize(bank), []
    votes = one_hot(known, classes).float()
    for part, wanted in zip(queries.split(512), truth.split(512), strict=True):
        similarity, rows = (normalize(part) @ bank.T).topk(min(k, len(bank)), dim=1)
        weighted = (votes[rows] * (similarity / TEMPERATURE).exp()[..., None]).sum(dim=1)
        right.append(weighted.argmax(dim=1) == wanted)
    return torch.cat(right)


def probe(bank: Tensor, queries: Tensor, known: Tensor, truth: Tensor) -> float:
    """Accuracy of a linear probe, with its penalty chosen by cross-validation on the bank."""
    classes = int(max(known.max(), truth.max())) + 1
    fitted = heads.fit(bank.numpy(), known.numpy(), classes)
    return heads.accuracy(fitted.head, queries.numpy(), truth.numpy())


def show(result: dict[str, Any], console: Console) -> None:
    """Print the accuracies as a table."""
    if "whitened" not in result:
        console.print("no class folders, so no accuracies; the masks are trained all the same")
        return
    console.print(table(result))
    console.print(footnote(result))


def footnote(result: dict[str, Any]) -> str:
    """The number of images and dimensions behind the table."""
    return f"{result['held_out_images']} held-out images; first two columns whitened to {result['dim']} dimensions"


def table(result: dict[str, Any]) -> Table:
    """k-NN and probe accuracy in percent, one row for each method."""
    table = Table("method", "k-NN", "probe", "k-NN plain", "probe plain")
    for method, whitened in result["whitened"].items():
        plain = result["plain"][method]
        table.add_row(method, *(percent(t[m]) for t in (whitened, plain) for m in ("knn", "probe")))
    return table


def verdict(result: dict[str, Any], mode: Mode) -> str:
    """Summarize whether training was better than the frozen backbone and the controls.

    There is one more line for each cluster that is worse. The measure is whitened k-NN accuracy on the held-out images,
    in points; without classes it can't be measured.
    """
    if "whitened" not in result:
        return "no class folders: whether this is better than the frozen backbone cannot be known from these images"
    table = {method: 100 * found["knn"] for method, found in result["whitened"].items()}
    own, plain, long = table[mode], table["frozen backbone"], table.get("equal-steps dispatcher")
    n = result["held_out_images"]
    if own < plain:
        said = (
            f"[yellow]warning:[/] {mode} is worse than the frozen backbone: k-NN {own:.1f} % against {plain:.1f} % on"
            f" {n} images: serve the plain backbone, or train with a lower --lr, a later --mask-from or more images"
        )
    else:
        said = f"{mode} over the frozen backbone: {own - plain:+.1f} points of k-NN on {n} images"
        if long is not None and mode != "dispatcher" and own < long:
            said += (
                f"; one mask trained as long has {long - own:.1f} more for less: --clusters 0 --steps with all steps"
            )
    for k, found in enumerate(result.get("clusters", [])):
        if found["worse"]:
            shares = f"{100 * found['own']:.1f} % against {100 * found['frozen']:.1f} %"
            said += (
                f"\n[yellow]warning:[/] cluster {k} is worse off than with the frozen backbone: k-NN {shares} on"
                f" {found['held_out_images']} images: give them a bundle of their own, or take a later --mask-from"
            )
    return said


def methods(run: Run, features: Features) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray]]]:
    """Yield each method and control: its name, and the blocks that it fuses of both sets, float32 [slots, N, F]."""
    for folder, method in (("frozen", "frozen backbone"), *reversed(CONTROLS.items())):
        if folder == "frozen" or (run.folder / folder).exists():
            train, test = run.features(folder)
            yield method, (train[None], test[None])
    yield "dispatcher", features.slots("dispatcher", run.recipe.layout)
    if run.recipe.clusters:
        yield "conditional", features.slots("conditional", run.recipe.layout)
        yield "unconditional", features.slots("unconditional", run.recipe.layout)


def joined(parts: np.ndarray) -> Tensor:
    """Concatenate blocks: float32 [slots, N, F] to [N, slots * F]."""
    return torch.from_numpy(np.concatenate(list(parts), axis=1))


def fusions(run: Run, features: Features) -> dict[Mode, Fitted]:
    """Fit each mode's fusion according to the recipe."""
    recipe = run.recipe
    dim = fusion.dimension(recipe, run.backbone.features, len(run.images))
    modes: tuple[Mode, ...] = ("dispatcher", "conditional", "unconditional") if recipe.clusters else ("dispatcher",)
    out: dict[Mode, Fitted] = {}
    for mode in modes:
        train, test = features.slots(mode, recipe.layout)
        projection = fusion.fit(train, dim, recipe.whiten, recipe.seed)
        embeddings = fusion.embed(projection, train), fusion.embed(projection, test)
        alone = mode == "conditional" and recipe.layout == "routed"
        out[mode] = Fitted(fusion.beside_nothing(projection) if alone else projection, *embeddings)
    return out


def command(run: RunFolder = RUN) -> None:
    """Evaluate a trained run."""
    with stage() as watch:
        trained = resume(run, watch)
        show(evaluate(trained, collect(trained)), Console())


if __name__ == "__main__":
    start(command)
