"""What is learned from: SwAV without labels, or cross-entropy with them.

Every batch is cut into pieces of ``PIECE`` images, each augmented with random numbers of its own. So whoever takes
which pieces, in how many processes or one after the other, sees the same views.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cascade.model.preprocessing import Preprocessing
from training import distributed
from training.data.augment import crop_flip, multi_crop
from training.masking import MaskedModel
from training.recipe import Recipe
from training.swav import Projector, push, sinkhorn, swapped_loss

PIECE = 16


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


class Objective(Protocol):
    """A loss with parameters of its own."""

    @property
    def module(self) -> nn.Module: ...

    def loss(self, model: MaskedModel, batch: Batch) -> Tensor:
        """Mean loss of a batch."""
        ...

    def facts(self) -> dict[str, float]:
        """What the curve tells of the time since it was last asked."""
        ...

    def before(self, progress: float) -> None:
        """Called before each step."""
        ...


class SelfSupervised:
    """SwAV with multi-crop and queue (paper §3.2; method.md §2).

    Args:
        views: stored trunk features to train on instead of the pixels, see ``training.data.feature_cache``.
    """

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
        for counts in ("coded", "nearest"):  # images by prototype, since facts were last asked for
            self.module.register_buffer(counts, torch.zeros(recipe.prototypes, dtype=torch.int64), persistent=False)
        self.module.register_buffer("crowded", torch.zeros(2), persistent=False)  # largest shares, batches

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
        """Of the images of all processes, ``used``: on how many prototypes their codes fell, and ``nearest``: to how
        many they are nearest, both exp of the entropy of their counts; ``largest``: the share of a batch that is
        nearest to the same one, on average, for an embedding that has collapsed may still wander.

        Codes are spread evenly whatever the embedding is like, as long as it tells images apart at all; the nearest
        prototypes are what a router of prototypes goes by.
        """
        used, nearest = (self._spread(self.module.get_buffer(name)) for name in ("coded", "nearest"))
        crowded = self.module.get_buffer("crowded")
        largest, batches = distributed.total(crowded).tolist()
        crowded.zero_()
        return {"used": round(used, 1), "nearest": round(nearest, 1), "largest": round(largest / max(1, batches), 4)}

    def _count(self, codes: Tensor, scores: Tensor) -> None:
        """Of a batch, both [B, P]; nothing here waits for the device."""
        for name, found in (("coded", codes), ("nearest", scores)):
            counts = torch.bincount(found.argmax(dim=1), minlength=found.shape[1])
            self.module.get_buffer(name).add_(counts)
        self.module.get_buffer("crowded").add_(torch.stack([counts.max() / len(scores), counts.new_ones(())]))

    def _spread(self, counts: Tensor) -> float:
        """exp of the entropy of the counts, which begin again at zero."""
        share = distributed.total(counts).double()
        counts.zero_()
        return float(torch.special.entr(share / share.sum().clamp(min=1)).sum().exp())

    def _trunk(self, model: MaskedModel, batch: Batch) -> Iterator[tuple[int, Tensor]]:
        """(crops, their trunk features [crops * B, C, h, w], crop by crop) of each size."""
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
            images = len(group) // r.draws
            stored = torch.from_numpy(group[draws * images + batch.rows]).to(batch.pixels.device).float()
            yield stored.shape[1], stored.transpose(0, 1).flatten(0, 1)

    def _code(self, view: int, scores: Tensor, progress: float) -> Tensor:
        """Sinkhorn over the batch of all processes, and over the queue once it is full and its time has come."""
        r = self.recipe
        everything = distributed.gather(scores)
        if progress >= r.queue_from and int(self.module.filled) >= r.queue > 0:  # type: ignore[arg-type]
            queue: Tensor = self.module.queue[view]  # type: ignore[index]
            everything = torch.cat([everything, queue @ self.module.prototypes.detach().T])
        first = distributed.rank() * len(scores)
        return sinkhorn(everything, r.epsilon, r.iterations)[first : first + len(scores)]


class Supervised:
    """Cross-entropy with a new linear head on crops and flips (method.md §2)."""

    def __init__(self, recipe: Recipe, features: int, preprocessing: Preprocessing, labels: np.ndarray) -> None:
        self.recipe, self.preprocessing = recipe, preprocessing
        self.labels = torch.from_numpy(labels)
        self.module = nn.Linear(features, int(labels.max()) + 1)

    def before(self, progress: float) -> None:
        pass

    def loss(self, model: MaskedModel, batch: Batch) -> Tensor:
        p, scale = self.preprocessing, self.recipe.global_scale
        x = torch.cat([crop_flip(x, p.size, scale, g, p.mean, p.std) for x, _, g in batch.pieces()])
        logits = self.module(model.tail(model.trunk(x)))
        return cross_entropy(logits, self.labels[batch.rows].to(logits.device))

    def facts(self) -> dict[str, float]:
        return {}
