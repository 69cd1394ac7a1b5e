"""The end of a pass: features to answers, in operations for all bundles at once, and one transfer for all of them.

route     clusters and out-of-domain scores, from the dispatcher's features
fuse      the blocks of the dispatcher and the experts to embeddings
labels    the best classes of the linear head
neighbors the nearest training images, searched on the CPU after the transfer
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cascade import metrics
from cascade.bundle.format import Bundle
from cascade.engine.items import Item, download, grouped, upload
from cascade.engine.results import Label, Neighbor, Prediction
from cascade.model import out_of_domain, router
from cascade.model.fusion import Fusion, Mode


@dataclass(eq=False)
class Group:
    """The images of one bundle in a pass, sorted by mode, and their intermediate results.

    Attributes:
        rows: the index of each image in the batch. items: the images, N of them.
        trunk: what the experts continue from, [N, ...]. features: of the dispatcher, float32 [N, F].
        cluster, confidence, ood: of each image, float32 or int64 [N].
        tails: passes of experts.
    """

    rows: list[int]
    items: list[Item]
    trunk: Tensor = field(init=False)
    features: Tensor = field(init=False)
    cluster: Tensor = field(init=False)
    confidence: Tensor = field(init=False)
    ood: Tensor = field(init=False)
    tails: "list[Tail]" = field(default_factory=list)

    @property
    def bundle(self) -> Bundle:
        return self.items[0].bundle

    @property
    def begin(self) -> int:
        """The first stage of the pass; 0 for pixels."""
        entry = self.items[0].entry
        return 0 if entry is None else entry.stage

    def modes(self) -> Iterator[tuple[Mode, int, int]]:
        """Yield each mode with the begin and end of its images."""
        modes = [item.mode for item in self.items]
        for mode in dict.fromkeys(modes):
            begin = modes.index(mode)
            yield mode, begin, begin + modes.count(mode)


@dataclass(eq=False)
class Tail:
    """One expert's pass over the images of a group that need it.

    Attributes:
        expert: its number. images: indices into the group, ascending.
        index: the same on the device, int64 [n]. features: float32 [n, F].
    """

    group: Group
    expert: int
    images: list[int]
    index: Tensor = field(init=False)
    features: Tensor = field(init=False)

    def input(self) -> Tensor:
        """The trunk's features of its images."""
        trunk = self.group.trunk
        return trunk if len(self.images) == len(trunk) else trunk.index_select(0, self.index)


def route(groups: Sequence[Group]) -> None:
    """Compute clusters, confidences and out-of-domain scores from the dispatchers' features, for all groups at once."""
    sizes = [len(group.items) for group in groups]
    zeros, ones = (new(sum(sizes)).split(sizes) for new in (groups[0].features.new_zeros, groups[0].features.new_ones))
    for group, zero, one in zip(groups, zeros, ones, strict=True):
        group.cluster, group.confidence, group.ood = zero, one, zero
        if (own := group.bundle.router) is not None:
            group.cluster, group.confidence = router.route(own, group.bundle.calibration, group.features)
    scored = [(group, group.bundle.ood) for group in groups if group.bundle.ood is not None]
    for alike in grouped(scored, lambda pair: pair[1].shape):
        features = [group.features for group, _ in alike]
        owner = upload([n for n, part in enumerate(features) for _ in range(len(part))], features[0].device)
        found = out_of_domain.scores([model for _, model in alike], features, owner)
        for (group, _), part in zip(alike, found.split([len(part) for part in features]), strict=True):
            group.ood = part


def finish(groups: Sequence[Group]) -> dict[int, Prediction]:
    """The answers of all groups, by index in the batch."""
    with metrics.stage("fuse"):
        embeddings = [_fuse(group) for group in groups]
        labels = _labels(groups, embeddings)
        tensors: list[Tensor] = []
        for group, own, best in zip(groups, embeddings, labels, strict=True):
            tensors += [group.cluster, group.confidence, group.ood, own, *(t for pair in best.values() for t in pair)]
        arrays = iter(download(tensors))
    answers: dict[int, Prediction] = {}
    for group, best in zip(groups, labels, strict=True):
        cluster, confidence, ood, embedding = (next(arrays) for _ in range(4))
        scores = {mode: (next(arrays), next(arrays)) for mode in best}
        answers |= _predictions(group, cluster, confidence, ood, embedding, scores)
    return answers


def _fuse(group: Group) -> Tensor:
    """Embeddings float32 [N, dim], each with the fusion of its mode."""
    fusions: dict[Mode, Fusion] = group.bundle.fusions
    modes = [*group.modes()]
    blocks = [fusions[mode].embed(group.features[b:e]) for mode, b, e in modes]
    embeddings = torch.cat(blocks) if len(blocks) > 1 else blocks[0]
    for mode, begin, end in modes:
        slots: dict[int, list[tuple[Tail, slice]]] = {}  # experts that share a slot share one product
        for tail in group.tails:
            span = slice(bisect_left(tail.images, begin), bisect_left(tail.images, end))
            if span.start < span.stop:
                slots.setdefault(fusions[mode].slot(tail.expert), []).append((tail, span))
        for parts in slots.values():
            index = torch.cat([tail.index[span] for tail, span in parts])
            features = torch.cat([tail.features[span] for tail, span in parts])
            embeddings.index_add_(0, index, fusions[mode].project(features, parts[0][0].expert))
    return embeddings


def _labels(groups: Sequence[Group], embeddings: Sequence[Tensor]) -> list[dict[Mode, tuple[Tensor, Tensor]]]:
    """Scores and classes [n, k] of each group's images, by mode, best first; k is the most that one of them requests.

    Heads with as many classes share all operations but the product.
    """
    best: list[dict[Mode, tuple[Tensor, Tensor]]] = [{} for _ in groups]
    wanted: list[tuple[int, Mode, int, Tensor]] = []
    for n, (group, own) in enumerate(zip(groups, embeddings, strict=True)):
        for mode, begin, end in group.modes():
            head, most = group.bundle.linear.get(mode), max(item.options.labels for item in group.items[begin:end])
            if head is not None and most > 0:
                logits = head.logits(own[begin:end])
                wanted.append((n, mode, min(most, logits.shape[1]), logits))
    for alike in grouped(wanted, lambda each: (each[2], each[3].shape[1])):
        rows = [each[3] for each in alike]
        scores, classes = torch.cat(rows).softmax(dim=1).topk(alike[0][2])
        parts = (whole.split([len(part) for part in rows]) for whole in (scores, classes.float()))
        for (n, mode, *_), *pair in zip(alike, *parts, strict=True):
            best[n][mode] = pair[0], pair[1]
    return best


def _neighbors(group: Group, embeddings: np.ndarray) -> list[tuple[Neighbor, ...]]:
    """The nearest training images of each row, nearest first."""
    nearest: list[tuple[Neighbor, ...]] = [()] * len(group.items)
    for mode, begin, end in group.modes():
        bank = group.bundle.banks.get(mode)
        asking = [i for i in range(begin, end) if group.items[i].options.neighbors > 0]
        if bank is None or not asking:
            continue
        most = max(group.items[i].options.neighbors for i in asking)
        similarities, rows = bank.nearest(torch.from_numpy(embeddings[asking]), most)
        for i, scores, found in zip(asking, similarities.tolist(), rows.tolist(), strict=True):
            pairs = [*zip(scores, found, strict=True)][: group.items[i].options.neighbors]
            nearest[i] = tuple(Neighbor(bank.names[n], bank.labels[n] if bank.labels else None, s) for s, n in pairs)
    return nearest


def _predictions(
    group: Group,
    cluster: np.ndarray,
    confidence: np.ndarray,
    ood: np.ndarray,
    embeddings: np.ndarray,
    best: dict[Mode, tuple[np.ndarray, np.ndarray]],
) -> dict[int, Prediction]:
    bundle = group.bundle
    masks = [[bundle.dispatcher.name] for _ in group.items]
    for tail in group.tails:
        for i in tail.images:
            masks[i].append(bundle.experts[tail.expert].name)
    labels: list[tuple[Label, ...]] = [()] * len(group.items)
    for mode, begin, end in group.modes():
        for i in range(begin, end) if mode in best else ():
            pairs = zip(*(part[i - begin, : max(0, group.items[i].options.labels)] for part in best[mode]), strict=True)
            labels[i] = tuple(Label(bundle.card.classes[int(n)], float(score)) for score, n in pairs)
    neighbors = _neighbors(group, embeddings)
    return {
        row: Prediction(
            bundle=bundle.name,
            version=bundle.version,
            mode=item.mode,
            cluster=int(cluster[i]),
            confidence=float(confidence[i]),
            ood=float(ood[i]),
            masks=tuple(masks[i]),
            labels=labels[i],
            neighbors=neighbors[i],
            embedding=embeddings[i].copy() if item.options.embedding else None,
            dispatch=item.dispatch,
        )
        for i, (row, item) in enumerate(zip(group.rows, group.items, strict=True))
    }
