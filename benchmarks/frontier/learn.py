"""Training on stored features: SwAV and distillation, the trainer's own losses on the lean tail."""

from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from benchmarks.frontier.lean import Tail
from benchmarks.frontier.sets import Set
from cascade.errors import CascadeError
from training.recipe import Recipe
from training.swav import Projector, sinkhorn, swapped_loss

State = dict[str, Tensor]
"""Scores by parameter, and head and prototypes (``head.weight``, ``head.bias``, ``prototypes``) of SwAV."""


@dataclass(frozen=True)
class Budget:
    """Steps of each part, the same for every data set and backbone."""

    dispatcher: int = 300
    expert: int = 100
    experts: int = 5
    distil: int = 400

    @property
    def second(self) -> int:
        """Of all experts together, and so of an unrouted second mask."""
        return self.experts * self.expert

    @property
    def cascade(self) -> int:
        return self.dispatcher + self.second

    @property
    def distilled(self) -> int:
        """Of a cascade that is distilled afterwards."""
        return self.cascade + self.distil


RECIPE = Recipe("", batch=64)


def swav(
    tail: Tail,
    data: Set,
    steps: int,
    seed: int,
    *,
    rows: np.ndarray | None = None,
    start: State | None = None,
    freeze_head: bool = False,
    own_head: bool = False,
    lr: float = RECIPE.lr,
    others: float = 0.0,
    batch: int = RECIPE.batch,
) -> State:
    """Train the tail's scores by SwAV on two stored views of each image.

    Args:
        rows: images to train on, all by default; ``others``: share of each batch that comes from all the rest.
        start: scores, head and prototypes to begin with. freeze_head: keep head and prototypes as they are.
        own_head: begin with a random head and random prototypes.
    """
    torch.manual_seed(seed)
    projector = Projector(tail.width, RECIPE.projection, RECIPE.prototypes)
    _begin(tail, start)
    if start is not None and not own_head:
        projector.load_state_dict({n: start[n] for n in projector.state_dict()})
    head = [] if freeze_head else list(projector.parameters())
    pick = _batches(data, rows, others, batch, seed)

    def loss(progress: float) -> Tensor:
        return _swapped(projector, progress, lambda: tail(_views(data, pick(), 2)), freeze_head)

    scores = torch.optim.Adam(tail.scores.values(), lr=lr, fused=True)
    _steps(loss, [scores, *_of_head(head)], steps)
    return tail.state() | {n: t.detach().clone() for n, t in projector.state_dict().items()}


def together(
    tail: Tail, data: Set, steps: int, seed: int, route: Tensor, count: int, start: State, *, lr: float = RECIPE.lr
) -> list[State]:
    """Train the experts of all clusters at once, in one space: one batch, one head, one SwAV loss.

    Every view goes through the mask of its own cluster, so that two views of an image may meet in two experts' spaces,
    which must agree then. An expert's scores are the sum of what all experts share, which every image moves, and of
    its own; with one cluster that is one mask at twice the rate.

    Args:
        route: cluster of each stored view, int64 [N, V], of ``count``.
        start: scores, head and prototypes to begin with.

    Returns:
        one state a cluster.
    """
    torch.manual_seed(seed)
    projector = Projector(tail.width, RECIPE.projection, RECIPE.prototypes)
    projector.load_state_dict({n: start[n] for n in projector.state_dict()})
    _begin(tail, start)
    pick, shared = _batches(data, None, 0.0, RECIPE.batch, seed), tail.scores
    own = [{n: nn.Parameter(torch.zeros_like(p)) for n, p in shared.items()} for _ in range(count)]

    def features() -> Tensor:
        rows = pick()
        which = _which(data, rows, 2)
        x, to = _taken(data.augmented, rows, which).float(), _taken(route, rows, which)
        out = torch.zeros(len(x), tail.width)
        for k in to.unique().tolist():
            tail.scores = {n: p + own[k][n] for n, p in shared.items()}
            at = (to == k).nonzero()[:, 0]
            out = out.index_copy(0, at, tail(x[at]))
        return out

    both = [*shared.values(), *(p for scores in own for p in scores.values())]
    try:
        _steps(
            lambda progress: _swapped(projector, progress, features),
            [torch.optim.Adam(both, lr=lr, fused=True), *_of_head(list(projector.parameters()))],
            steps,
        )
    finally:
        tail.scores = shared
    head = {n: t.detach().clone() for n, t in projector.state_dict().items()}
    return [{n: (p + scores[n]).detach() for n, p in shared.items()} | head for scores in own]


def distil(
    tail: Tail,
    data: Set,
    steps: int,
    seed: int,
    targets: Tensor,
    start: State,
    *,
    rows: np.ndarray | None = None,
    lr: float = RECIPE.lr,
    others: float = 0.0,
    batch: int = RECIPE.batch,
) -> State:
    """Train the tail's scores to give the embeddings ``targets`` [N, T] of the training images, without labels.

    Every image is seen as it is and as one stored view; the target is the same. The linear map from features to
    targets is fitted first (or goes on from ``start``), so that the steps are spent on the mask.
    """
    _begin(tail, start)
    if "map" not in start:
        with torch.no_grad():
            found = torch.cat([tail(x) for x in data.clean.split(256)])
        start = start | dict(zip(("map", "map.bias"), ridge(found, targets), strict=True))
    weight, bias = start["map"].clone().requires_grad_(), start["map.bias"].clone().requires_grad_()
    pick = _batches(data, rows, others, batch, seed)

    def loss(progress: float) -> Tensor:
        chosen = pick()
        x = torch.cat([data.clean[chosen].float(), _views(data, chosen, 1)])
        return distance(tail(x) @ weight + bias, targets[chosen])

    scores = torch.optim.Adam(tail.scores.values(), lr=lr, fused=True)
    own = torch.optim.Adam([weight, bias], lr=1e-3 * lr / RECIPE.lr)
    _steps(loss, [scores, own], steps)
    kept = {n: start[n] for n in ("head.weight", "head.bias", "prototypes") if n in start}
    return kept | tail.state() | {"map": weight.detach(), "map.bias": bias.detach()}


def distance(found: Tensor, wanted: Tensor) -> Tensor:
    """Cosine and relational loss of a batch (relational knowledge distillation, arXiv 1904.05068).

    Args:
        found: embeddings [V * B, T] of V views of the images, view by view.
        wanted: the teacher's [B, T]; the relations are the cosines between the images of a view.
    """
    a, b = normalize(found).unflatten(0, (-1, len(wanted))), normalize(wanted)
    own = 1 - (a * b).sum(dim=2).mean()
    relations = (a @ a.transpose(1, 2) - b @ b.T).square().sum(dim=2).mean()
    return own + relations


def ridge(features: Tensor, targets: Tensor, strength: float = 0.01) -> tuple[Tensor, Tensor]:
    """Weight [F, T] and bias [T] of ridge regression; ``strength`` in mean variances of the features."""
    mean, centre = features.mean(dim=0), targets.mean(dim=0)
    x = (features - mean).double()
    gram = x.T @ x
    gram.diagonal().add_(strength * gram.diagonal().mean())
    weight = torch.linalg.solve(gram, x.T @ (targets - centre).double()).float()
    return weight, centre - mean @ weight


def masked_features(tail: Tail, state: State, maps: Tensor) -> Tensor:
    """Features under a mask: float16 [N, F]."""
    tail.load(state)
    with torch.no_grad():
        return torch.cat([tail(x).half() for x in maps.split(256)])


def _begin(tail: Tail, start: State | None) -> None:
    tail.load(start if start is not None else {n: torch.ones_like(w) for n, w in tail.weights.items()})


def _batches(data: Set, rows: np.ndarray | None, others: float, batch: int, seed: int) -> Callable[[], Tensor]:
    """Draws one batch after the other, by epochs of ``rows``."""
    rows = np.arange(len(data.clean)) if rows is None else rows
    if not len(rows):
        raise CascadeError("a cluster without images: take fewer clusters")
    rest = np.setdiff1d(np.arange(len(data.clean)), rows)
    draw = np.random.default_rng(seed)
    strangers = round(others * batch) if len(rest) else 0
    left = np.empty(0, np.int64)

    def pick() -> Tensor:
        nonlocal left
        while len(left) < batch - strangers:
            left = np.concatenate([left, draw.permutation(rows)])
        chosen, left = left[: batch - strangers], left[batch - strangers :]
        return torch.from_numpy(np.concatenate([chosen, draw.choice(rest, strangers)]) if strangers else chosen)

    return pick


def _swapped(
    projector: Projector, progress: float, features: Callable[[], Tensor], freeze_head: bool = False
) -> Tensor:
    """SwAV's loss of the features [2 * B, F] of two views, view by view."""
    projector.renormalise()
    projector.prototypes.requires_grad_(not freeze_head and progress >= RECIPE.freeze_prototypes)
    z = projector(features()).chunk(2)
    scores = [v @ projector.prototypes.T for v in z]
    codes = [sinkhorn(s.detach(), RECIPE.epsilon, RECIPE.iterations) for s in scores]
    return swapped_loss(scores, codes, RECIPE.temperature)


def _of_head(parameters: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    if not parameters:
        return []
    return [torch.optim.SGD(parameters, lr=RECIPE.head_lr, momentum=0.9, weight_decay=RECIPE.head_decay)]


def _views(data: Set, rows: Tensor, count: int) -> Tensor:
    """``count`` different stored views of each image: float32 [count * B, P, C], view by view."""
    return _taken(data.augmented, rows, _which(data, rows, count)).float()


def _which(data: Set, rows: Tensor, count: int) -> Tensor:
    """Numbers of ``count`` different views of each image, int64 [B, count]."""
    return torch.rand(len(rows), data.augmented.shape[1]).topk(count, dim=1).indices


def _taken(of: Tensor, rows: Tensor, which: Tensor) -> Tensor:
    """Entries of [N, V, ...] as [count * B, ...], view by view."""
    return of[rows[:, None], which].transpose(0, 1).flatten(0, 1)


def _steps(loss: Callable[[float], Tensor], optimizers: list[torch.optim.Optimizer], steps: int) -> None:
    """Cosine decay to zero, no warm-up."""
    first = [[g["lr"] for g in o.param_groups] for o in optimizers]
    for step in range(steps):
        for o, rates in zip(optimizers, first, strict=True):
            for group, rate in zip(o.param_groups, rates, strict=True):
                group["lr"] = rate * 0.5 * (1 + cos(pi * step / steps))
            o.zero_grad(set_to_none=True)
        loss(step / steps).backward()
        for o in optimizers:
            o.step()
