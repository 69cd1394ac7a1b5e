"""Training on stored features: SwAV and distillation, the trainer's own losses on the lean tail."""

from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi

import numpy as np
import torch
from torch import Tensor
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
    lr: float = RECIPE.lr,
    others: float = 0.0,
    batch: int = RECIPE.batch,
) -> State:
    """Train the tail's scores by SwAV on two stored views of each image.

    Args:
        rows: images to train on, all by default; ``others``: share of each batch that comes from all the rest.
        start: scores, head and prototypes to begin with. freeze_head: keep head and prototypes as they are.
    """
    torch.manual_seed(seed)
    projector = Projector(tail.width, RECIPE.projection, RECIPE.prototypes)
    _begin(tail, start)
    if start is not None:
        projector.load_state_dict({n: start[n] for n in projector.state_dict()})
    head = [] if freeze_head else list(projector.parameters())
    pick = _batches(data, rows, others, batch, seed)

    def loss(progress: float) -> Tensor:
        projector.renormalise()
        projector.prototypes.requires_grad_(not freeze_head and progress >= RECIPE.freeze_prototypes)
        z = projector(tail(_views(data, pick(), 2))).chunk(2)
        scores = [v @ projector.prototypes.T for v in z]
        codes = [sinkhorn(s.detach(), RECIPE.epsilon, RECIPE.iterations) for s in scores]
        return swapped_loss(scores, codes, RECIPE.temperature)

    scores = torch.optim.Adam(tail.scores.values(), lr=lr, fused=True)
    sgd = torch.optim.SGD(head, lr=RECIPE.head_lr, momentum=0.9, weight_decay=RECIPE.head_decay) if head else None
    _steps(loss, [o for o in (scores, sgd) if o is not None], steps)
    return tail.state() | {n: t.detach().clone() for n, t in projector.state_dict().items()}


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


def _views(data: Set, rows: Tensor, count: int) -> Tensor:
    """``count`` different stored views of each image: float32 [count * B, P, C], view by view."""
    which = torch.rand(len(rows), data.augmented.shape[1]).topk(count, dim=1).indices
    return data.augmented[rows[:, None], which].transpose(0, 1).flatten(0, 1).float()


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
