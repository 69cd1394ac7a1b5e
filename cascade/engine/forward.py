"""One pass: images of any bundles over one resident backbone, to their answers.

The way of a batch: trunk shared by all bundles that agree on it -> dispatcher tails -> router -> group by mask ->
expert tails -> fusion -> heads. An image's answer does not depend on its neighbors in the batch.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from cascade import metrics
from cascade.bundle.format import Bundle
from cascade.engine.executors import Distinct, Executor
from cascade.engine.results import Label, Neighbor, Options, Prediction
from cascade.engine.weight_cache import WeightCache
from cascade.model import router
from cascade.model.fusion import Fusion, Mode
from cascade.model.masks import Mask

FEW = 4  # images a mask, below which a pass with a mask for each image is taken where the executor has one
CHUNK = 32  # images that an executor gets at a time: what a larger batch saves is swaps, at no more memory for layers
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Item:
    """One image that is ready for a pass: decoded, and its bundle and mode settled.

    Attributes:
        bundle: serves this image even if a newer version comes before its pass.
        mode: one that the bundle has.
        options: what the answer should hold.
        pixels: float32 [3, H, W], preprocessed.
    """

    bundle: Bundle
    mode: Mode
    options: Options
    pixels: Tensor


def trunk(item: Item) -> Hashable:
    """Items that agree on this share the plain backbone up to their dispatchers' first stage."""
    bundle = item.bundle
    return bundle.card.backbone.fingerprint, bundle.dispatcher.start, item.pixels.shape


def forward(
    executors: dict[str, Executor], weight_cache: WeightCache, device: str, items: Sequence[Item]
) -> list[Prediction]:
    """Answers of ``items``, in their order.

    Args:
        executors: by their backbone's fingerprint. weight_cache: of all of them.
        items: of any bundles; those that share the plain trunk run through it together.
    """
    answers: dict[int, Prediction] = {}
    for rows in _groups(range(len(items)), lambda row: trunk(items[row])):
        own = [items[row] for row in rows]
        executor = executors[own[0].bundle.card.backbone.fingerprint]
        for other in executors.values():  # no backbone may look at weights that are evicted for this one
            if other is not executor:
                other.swap(None)
        answers.update(zip(rows, _one(executor, weight_cache, device, own), strict=True))
    return [answers[row] for row in range(len(items))]


def _one(executor: Executor, weight_cache: WeightCache, device: str, items: list[Item]) -> list[Prediction]:
    """Items of one backbone, one input shape and one first masked stage: the plain trunk is theirs together."""
    bundle = items[0].bundle
    shared: Tensor | None = None
    if start := bundle.dispatcher.start:
        executor.swap(None)
        with metrics.stage("dispatch"):
            shared = _run(executor, _stack(items, device), 0, start)
    answers: dict[int, Prediction] = {}
    each: dict[int, tuple[Tensor, Tensor]] = {}  # dispatched already, by row
    groups = _groups(range(len(items)), lambda row: items[row].bundle.identity)
    if isinstance(executor, Distinct) and len(groups) > 1 and len(items) < FEW * len(groups):
        for rows in _groups(range(len(items)), lambda row: _split(items[row].bundle)):
            own = [items[row] for row in rows]
            x = _stack(own, device) if shared is None else shared[rows]
            each.update(zip(rows, _dispatch_each(executor, own, x), strict=True))
    # Those whose weights are there come first, or they would be evicted for the others and made again.
    order = sorted(groups, key=lambda rows: items[rows[0]].bundle.dispatcher not in weight_cache)
    coming = [items[rows[0]].bundle.dispatcher for rows in order[1:]]
    for rows, following in zip(order, [*coming, None], strict=True):
        own = [items[row] for row in rows]
        if rows[0] in each:
            trunk, features = (torch.stack(parts) for parts in zip(*(each[row] for row in rows), strict=True))
        else:
            x = _stack(own, device) if shared is None else shared[rows]
            trunk, features = _dispatch(executor, own[0].bundle, x, following)
        found = _finish(executor, own, trunk, features, following)
        answers.update(zip(rows, found, strict=True))
    return [answers[row] for row in range(len(items))]


def _dispatch(executor: Executor, bundle: Bundle, x: Tensor, following: Mask | None) -> tuple[Tensor, Tensor]:
    """A bundle's images under its dispatcher: what its experts go on from, and the dispatcher's features."""
    start, split = bundle.dispatcher.start, _split(bundle)
    _swap(executor, bundle.dispatcher)
    if following is not None and not bundle.experts:
        executor.prefetch(following)
    with metrics.stage("dispatch"):
        trunk = _run(executor, x, start, split) if split > start else x
        return trunk, _run(executor, trunk, split)


def _dispatch_each(executor: Distinct, items: list[Item], x: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    """The same for images of many bundles at once, each under its own dispatcher; they split at one stage."""
    masks = [item.bundle.dispatcher for item in items]
    start, split = masks[0].start, _split(items[0].bundle)
    with metrics.stage("dispatch"):
        trunk = executor.run_each(x, masks, start, split) if split > start else x
        return zip(trunk, executor.run_each(trunk, masks, split), strict=True)


def _finish(
    executor: Executor, items: list[Item], trunk: Tensor, features: Tensor, following: Mask | None
) -> list[Prediction]:
    """Items of one bundle: router, each expert for the rows that want it, fusion, heads."""
    bundle = items[0].bundle
    with metrics.stage("dispatch"):
        routed, confidence = router.route(bundle.router, bundle.calibration, features)
        ood = torch.zeros(len(items)) if bundle.ood is None else bundle.ood.score(features)
        cluster = routed.tolist()
    fusions = [bundle.fusions[item.mode] for item in items]
    with metrics.stage("fuse"):
        embeddings = torch.stack([f.bias for f in fusions])
        _fuse(embeddings, fusions, list(range(len(items))), features, None)
    applied: list[list[str]] = [[bundle.dispatcher.name] for _ in items]
    wanted = [
        (k, rows)
        for k in range(len(bundle.experts))
        if (rows := [row for row, item in enumerate(items) if _wants(item.mode, k, cluster[row])])
    ]
    for nth, (k, rows) in enumerate(wanted):
        expert = bundle.experts[k]
        metrics.GROUP_IMAGES.observe(len(rows))
        _swap(executor, expert)
        after = bundle.experts[wanted[nth + 1][0]] if nth + 1 < len(wanted) else following
        if after is not None:
            executor.prefetch(after)
        with metrics.stage("expert"):
            block = _run(executor, trunk[rows], expert.start)
        with metrics.stage("fuse"):
            _fuse(embeddings, fusions, rows, block, k)
        for row in rows:
            applied[row].append(expert.name)
    labels, neighbors = _labels(items, embeddings), _neighbors(items, embeddings)
    return [
        Prediction(
            bundle=bundle.name,
            version=bundle.version,
            mode=item.mode,
            cluster=cluster[row],
            confidence=float(confidence[row]),
            ood=float(ood[row]),
            masks=tuple(applied[row]),
            labels=labels[row],
            neighbors=neighbors[row],
            embedding=embeddings[row].cpu().numpy() if item.options.embedding else None,
        )
        for row, item in enumerate(items)
    ]


def _groups(items: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    """Items with equal keys together, in the order of first appearance."""
    found: dict[Hashable, list[T]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return [*found.values()]


def _run(executor: Executor, x: Tensor, start: int, stop: int | None = None) -> Tensor:
    """Stages of the backbone under the mask that is in place, for any number of images."""
    if len(x) <= CHUNK:
        return executor.run(x, start, stop)
    return torch.cat([executor.run(part, start, stop) for part in x.split(CHUNK)])


def _swap(executor: Executor, mask: Mask) -> None:
    with metrics.stage("swap"):
        executor.swap(mask)


def _split(bundle: Bundle) -> int:
    """The stage up to which the dispatcher's pass serves the experts, too."""
    return min((expert.start for expert in bundle.experts), default=bundle.dispatcher.start)


def _wants(mode: Mode, expert: int, cluster: int) -> bool:
    """Whether an image in this mode, routed to this cluster, takes a pass under this expert."""
    return mode == "unconditional" or (mode == "conditional" and cluster == expert)


def _stack(items: list[Item], device: str) -> Tensor:
    return torch.stack([item.pixels for item in items]).to(device)


def _fuse(out: Tensor, fusions: list[Fusion], rows: list[int], block: Tensor, expert: int | None) -> None:
    """Add one mask's features ``block`` (of ``rows``) to the embeddings ``out``, each by its own fusion."""
    for fusion in set(fusions):
        at = [i for i, row in enumerate(rows) if fusions[row] is fusion]
        if at:
            out[[rows[i] for i in at]] += fusion.project(block[at], expert)


def _labels(items: list[Item], embeddings: Tensor) -> list[tuple[Label, ...]]:
    """The best labels of each row, best first."""
    out: list[tuple[Label, ...]] = []
    for row, item in enumerate(items):
        head = item.bundle.linear.get(item.mode)
        if head is None or item.options.labels <= 0:
            out.append(())
            continue
        scores = head.scores(embeddings[row : row + 1])[0]
        best = scores.topk(min(item.options.labels, len(scores)))
        pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        out.append(tuple(Label(item.bundle.card.classes[i], score) for score, i in pairs))
    return out


def _neighbors(items: list[Item], embeddings: Tensor) -> list[tuple[Neighbor, ...]]:
    """The nearest training images of each row, nearest first."""
    out: list[tuple[Neighbor, ...]] = []
    for row, item in enumerate(items):
        bank = item.bundle.banks.get(item.mode)
        if bank is None or item.options.neighbors <= 0:
            out.append(())
            continue
        similarities, found = bank.nearest(embeddings[row : row + 1], item.options.neighbors)
        pairs = zip(similarities[0].tolist(), found[0].tolist(), strict=True)
        out.append(tuple(Neighbor(bank.names[i], bank.labels[i] if bank.labels else None, s) for s, i in pairs))
    return out
