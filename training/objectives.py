"""Training objectives: distillation or SwAV without labels, cross-entropy with labels.

Every batch is split into pieces of ``PIECE`` images, each augmented with its own random numbers. So the views do not
depend on how the pieces are distributed over processes and steps of gradient accumulation.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, smooth_l1_loss

from cascade.model.preprocessing import Preprocessing
from training import distributed
from training.data.augment import multi_crop, normalize, shift_flip
from training.masking import MaskedModel
from training.recipe import Recipe
from training.swav import Projector, push, sinkhorn, swapped_loss

PIECE = 16
SHIFT = 8  # images are shifted by up to this fraction of their side
WARMUP_STEPS = 30  # of distillation
HEAD_LR, SWAV_HEAD_LR = 0.001, 0.15  # if the recipe leaves the choice to the objective


@dataclass(frozen=True)
class Batch:
    """Images of one step, or a part of them.

    Attributes:
        pixels: uint8 [B, 3, S, S]. rows: their numbers, int64 [B].
        progress: of the training, in [0, 1).
        generators: one for each piece of ``PIECE`` images.
    """

    pixels: Tensor
    rows: np.ndarray
    progress: float
    generators: Sequence[torch.Generator]

    def pieces(self) -> Iterator[tuple[Tensor, np.ndarray, torch.Generator]]:
        """(pixels, rows, generator) of each piece."""
        for i, generator in enumerate(self.generators):
            piece = slice(i * PIECE, (i + 1) * PIECE)
            yield self.pixels[piece], self.rows[piece], generator

    def draws(self, count: int) -> np.ndarray:
        """One of ``count`` stored augmentations for each image, int64 [B]."""
        drawn = [torch.randint(count, (len(rows),), generator=own) for _, rows, own in self.pieces()]
        return torch.cat(drawn).numpy()

    def stored(self, views: np.ndarray, count: int, draws: np.ndarray) -> Tensor:
        """Rows of ``count`` stored augmentations of all images, float16 [count * N, ...]: float32 [B, ...].

        Args:
            draws: which augmentation of each image, int64 [B].
        """
        rows = draws * (len(views) // count) + self.rows
        return torch.from_numpy(views[rows]).to(self.pixels.device).float()


class Objective(Protocol):
    """A loss with its own parameters.

    Attributes:
        falls: whether the loss must fall from the first steps on (SwAV's may rise while codes form).
    """

    falls: bool

    @property
    def module(self) -> nn.Module: ...

    def optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer of the objective's own parameters."""
        ...

    def head_steps(self, steps: int) -> int:
        """Number of initial steps that train only the objective's own parameters."""
        ...

    def warmup(self, steps: int) -> float:
        """Share of the steps in which the learning rates rise."""
        ...

    def loss(self, model: MaskedModel, batch: Batch) -> Tensor:
        """Mean loss of a batch."""
        ...

    def facts(self) -> dict[str, float]:
        """Values for the curve about the steps since the last call."""
        ...

    def before(self, progress: float) -> None:
        """Hook called before each step."""
        ...


class SelfSupervised:
    """SwAV with multi-crop and queue (paper §3.2; method.md §2).

    Args:
        views: stored trunk features to train on instead of the pixels, see ``training.data.feature_cache``.
    """

    falls = False

    def __init__(
        self,
        recipe: Recipe,
        features: int,
        preprocessing: Preprocessing,
        views: Sequence[np.ndarray] | None = None,
    ) -> None:
        self.recipe, self.preprocessing, self.views = recipe, preprocessing, views
        self.module = Projector(features, recipe.projection, recipe.prototypes)
        self.module.register_buffer("queue", torch.zeros(2, recipe.queue, recipe.projection))
        self.module.register_buffer("filled", torch.zeros(1, dtype=torch.int64))
        for counts in ("coded", "nearest"):  # images by prototype, since the last call of facts
            self.module.register_buffer(counts, torch.zeros(recipe.prototypes, dtype=torch.int64), persistent=False)
        self.module.register_buffer("crowded", torch.zeros(2), persistent=False)  # largest shares, batches

    def optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        r = self.recipe
        return torch.optim.SGD(parameters, lr=r.head_lr or SWAV_HEAD_LR, momentum=0.9, weight_decay=r.head_decay)

    def head_steps(self, steps: int) -> int:
        return 0

    def warmup(self, steps: int) -> float:
        return self.recipe.warmup

    def before(self, progress: float) -> None:
        self.module.renormalize()
        self.module.prototypes.requires_grad_(progress >= self.recipe.freeze_prototypes)

    def loss(self, model: MaskedModel, batch: Batch) -> Tensor:
        z: list[Tensor] = []
        for count, x in self._trunk(model, batch):
            z += self.module(model.tail(x)).chunk(count)
        prototypes = self.module.prototypes
        scores = [v @ prototypes.T for v in z]
        codes = [self._code(i, scores[i], batch.progress) for i in range(2)]
        queue: Tensor = self.module.queue  # type: ignore[assignment]
        newest = torch.stack([distributed.gather(z[0]), distributed.gather(z[1])])
        queue.copy_(push(queue, newest))
        self.module.filled += newest.shape[1]  # type: ignore[operator, assignment]
        self._count(codes[0], scores[0].detach())
        return swapped_loss(scores, codes, self.recipe.temperature)

    def facts(self) -> dict[str, float]:
        """Statistics over the images of all processes. ``used``: effective number of prototypes among their codes;
        ``nearest``: effective number of nearest prototypes; both are exp of the entropy of the counts. ``largest``: the
        share of a batch that is nearest to the same prototype, on average per batch, because a collapsed embedding may
        still drift.

        Codes are spread evenly for any embedding that distinguishes images at all; a router of prototypes uses the
        nearest prototypes.
        """
        used, nearest = (self._spread(self.module.get_buffer(name)) for name in ("coded", "nearest"))
        crowded = self.module.get_buffer("crowded")
        largest, batches = distributed.total(crowded).tolist()
        crowded.zero_()
        return {"used": round(used, 1), "nearest": round(nearest, 1), "largest": round(largest / max(1, batches), 4)}

    def _count(self, codes: Tensor, scores: Tensor) -> None:
        """Count a batch, both [B, P]; nothing here waits for the device."""
        for name, found in (("coded", codes), ("nearest", scores)):
            counts = torch.bincount(found.argmax(dim=1), minlength=found.shape[1])
            self.module.get_buffer(name).add_(counts)
        self.module.get_buffer("crowded").add_(torch.stack([counts.max() / len(scores), counts.new_ones(())]))

    def _spread(self, counts: Tensor) -> float:
        """Return exp of the entropy of the counts, and reset them to zero."""
        share = distributed.total(counts).double()
        counts.zero_()
        return float(torch.special.entr(share / share.sum().clamp(min=1)).sum().exp())

    def _trunk(self, model: MaskedModel, batch: Batch) -> Iterator[tuple[int, Tensor]]:
        """Yield, for each size, the number of crops and their trunk features [crops * B, C, h, w], crop by crop."""
        r, p = self.recipe, self.preprocessing
        if self.views is None:
            groups = r.crops(p.size)
            drawn = [multi_crop(x, groups, generator=g, mean=p.mean, std=p.std) for x, _, g in batch.pieces()]
            views = [torch.cat(pieces) for pieces in zip(*drawn, strict=True)]
            for count, _, _ in groups:
                yield count, model.trunk(torch.cat([views.pop(0) for _ in range(count)]))
            return
        draws = batch.draws(r.draws)
        for group in self.views:
            stored = batch.stored(group, r.draws, draws)
            yield stored.shape[1], stored.transpose(0, 1).flatten(0, 1)

    def _code(self, view: int, scores: Tensor, progress: float) -> Tensor:
        """Sinkhorn over the batch of all processes, and over the queue if it is full and ``queue_from`` is reached."""
        r = self.recipe
        everything = distributed.gather(scores)
        if progress >= r.queue_from and int(self.module.filled) >= r.queue > 0:  # type: ignore[arg-type]
            queue: Tensor = self.module.queue[view]  # type: ignore[index]
            everything = torch.cat([everything, queue @ self.module.prototypes.detach().T])
        first = distributed.rank() * len(scores)
        return sinkhorn(everything, r.epsilon, r.iterations)[first : first + len(scores)]


class Supervised:
    """Cross-entropy with a linear head, on shifted and mirrored images.

    The head starts from zero and is first trained alone; with ``head_steps`` 0 it starts at random and is trained by
    SGD from the first step, as in the paper.

    Args:
        labels: int64 [N]. rows: the images to train on (default: all), for the class weights.
        views: stored trunk features to train on instead of the pixels, float16 [draws * N, C, h, w].
    """

    falls = True

    def __init__(
        self,
        recipe: Recipe,
        features: int,
        preprocessing: Preprocessing,
        labels: np.ndarray,
        classes: int = 0,
        rows: np.ndarray | None = None,
        views: np.ndarray | None = None,
    ) -> None:
        self.recipe, self.preprocessing, self.views = recipe, preprocessing, views
        self.labels = torch.from_numpy(labels)
        classes = classes or int(labels.max()) + 1
        self.module = nn.Linear(features, classes)
        if recipe.head_steps:
            for parameter in self.module.parameters():
                nn.init.zeros_(parameter)
        known = self.labels if rows is None else self.labels[rows]
        counts = torch.bincount(known, minlength=classes).float().clamp(min=1)
        self.weights = len(known) / (classes * counts) if recipe.class_weights else None

    def optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        rate = self.recipe.head_lr or HEAD_LR
        if self.recipe.head_steps:
            return torch.optim.AdamW(parameters, lr=rate)
        return torch.optim.SGD(parameters, lr=rate, momentum=0.9)

    def head_steps(self, steps: int) -> int:
        return min(self.recipe.head_steps, steps // 5)

    def warmup(self, steps: int) -> float:
        return self.recipe.warmup

    def before(self, progress: float) -> None:
        pass

    def loss(self, model: MaskedModel, batch: Batch) -> Tensor:
        logits = self.module(model.tail(self._trunk(model, batch)))
        weights = None if self.weights is None else self.weights.to(logits.device)
        truth = self.labels[batch.rows].to(logits.device)
        return cross_entropy(logits, truth, weights, label_smoothing=self.recipe.label_smoothing)

    def _trunk(self, model: MaskedModel, batch: Batch) -> Tensor:
        p, draws = self.preprocessing, self.recipe.draws
        if self.views is not None:
            return batch.stored(self.views, draws, batch.draws(draws))
        shifted = [shift_flip(x, p.size // SHIFT, g, p.mean, p.std) for x, _, g in batch.pieces()]
        return model.trunk(torch.cat(shifted))

    def facts(self) -> dict[str, float]:
        return {}


class Distillation:
    """The frozen backbone at a larger input size (or another network) teaches this one, without labels.

    Smooth L1 distance between features, both standardized by the mean and deviation of the teacher's.

    Args:
        teacher: features of the images and of their mirror images, float16 [2, N, F_t].
        start: the student's features before training, float32 [N, F]. Needed if the teacher has another width: a linear
            map from student to teacher is then fitted by ridge regression and trained as well.
        views: stored trunk features of the images and of their mirror images, float16 [2 * N, C, h, w]; default: from
            the pixels.
    """

    falls = True

    def __init__(
        self,
        recipe: Recipe,
        preprocessing: Preprocessing,
        teacher: np.ndarray,
        start: np.ndarray | None = None,
        views: np.ndarray | None = None,
    ) -> None:
        self.recipe, self.preprocessing, self.teacher, self.views = recipe, preprocessing, teacher, views
        plain = torch.from_numpy(np.asarray(teacher[0], np.float32))
        self.mean, self.deviation = plain.mean(dim=0), plain.std(dim=0)
        self.deviation = self.deviation.clamp(min=float(self.deviation.mean()) * 1e-2 + 1e-12)
        self.module: nn.Module = nn.Identity()
        if start is not None:
            self.module = _ridge(torch.from_numpy(start), (plain - self.mean) / self.deviation)

    def optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=self.recipe.head_lr or HEAD_LR)

    def head_steps(self, steps: int) -> int:
        return 0

    def warmup(self, steps: int) -> float:
        return self.recipe.warmup or min(WARMUP_STEPS, steps / 10) / max(1, steps)

    def before(self, progress: float) -> None:
        pass

    def loss(self, model: MaskedModel, batch: Batch) -> Tensor:
        mirrored = batch.draws(2)
        return self.distance(model.tail(self._trunk(model, batch, mirrored)), self.teacher[mirrored, batch.rows])

    def _trunk(self, model: MaskedModel, batch: Batch, mirrored: np.ndarray) -> Tensor:
        p = self.preprocessing
        if self.views is not None:
            return batch.stored(self.views, 2, mirrored)
        x = batch.pixels.float().div_(255)
        flip = torch.from_numpy(mirrored > 0).to(x.device)[:, None, None, None]
        return model.trunk(normalize(torch.where(flip, x.flip(3), x), p.mean, p.std))

    def distance(self, features: Tensor, wanted: np.ndarray) -> Tensor:
        """Mean smooth L1 distance of student features [B, F] to the teacher's [B, F_t]."""
        mean, deviation = self.mean.to(features.device), self.deviation.to(features.device)
        target = (torch.from_numpy(np.asarray(wanted, np.float32)).to(features.device) - mean) / deviation
        own = (features - mean) / deviation if isinstance(self.module, nn.Identity) else self.module(features)
        return smooth_l1_loss(own, target)

    def facts(self) -> dict[str, float]:
        return {}


def _ridge(features: Tensor, target: Tensor, penalty: float = 1e-2) -> nn.Linear:
    """Fit a linear map from features [N, F] to targets [N, T] by ridge regression; the penalty is relative."""
    mean = features.mean(dim=0)
    x = (features - mean).double()
    gram = x.T @ x
    gram.diagonal().add_(penalty * float(gram.diagonal().mean()))
    weight = torch.linalg.solve(gram, x.T @ target.double()).T.float()
    layer = nn.Linear(features.shape[1], target.shape[1])
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(target.mean(dim=0) - weight @ mean)
    return layer
