"""Cached trunk features of augmented views, computed once and trained on many times.

If masks begin at a late stage, everything before it is frozen and the same for dispatcher, experts, controls
and seeds. A step on stored trunk features only runs the tail. The price is that each image has a fixed number of
augmentations, ``draws``, instead of a new one every time. Distillation only mirrors images, so it pays no price.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cascade.engine.executors.plain import PlainExecutor
from cascade.errors import CascadeError
from cascade.model.preprocessing import Preprocessing
from training.data.array_cache import stored
from training.data.augment import SIGMA_SIDE, Crop, multi_crop, normalize, shift_flip
from training.loop import generator

BATCH = 64
Augment = Callable[[Tensor, int, torch.Generator], list[Tensor]]
"""Views of a batch, uint8 [B, 3, S, S] -> float32 [B, 3, side, side] each, for the number of a draw."""


def store(
    executor: PlainExecutor,
    stage: int,
    pixels: np.ndarray,
    preprocessing: Preprocessing,
    crops: tuple[Crop, ...],
    draws: int,
    path: Path,
) -> list[np.ndarray]:
    """Compute or map the features before ``stage`` of ``draws`` multi-crops of every image.

    Args:
        pixels: uint8 [N, 3, S, S], the training cache.
        crops: (count, side, scale) of the multi-crop's groups.
        path: name of the cache files; it must identify all the other arguments.

    Returns:
        One array per group, float16 [draws * N, count, C, h, w], mapped from disk; image i of draw d is row
        ``d * N + i``.
    """
    if len({side for _, side, _ in crops}) < len(crops):
        raise CascadeError("stored features need local crops of another size than the global ones: see --local-size")
    blur, p = crops[0][1] / SIGMA_SIDE, preprocessing  # one blur for all sizes, as in a live multi-crop

    def cropped(crop: Crop) -> Augment:
        return lambda batch, _, own: multi_crop(batch, (crop,), generator=own, mean=p.mean, std=p.std, blur=blur)

    return [_stored(executor, stage, pixels, cropped(c), c[0], c[1], draws, path) for c in crops]


def store_shifted(
    executor: PlainExecutor,
    stage: int,
    pixels: np.ndarray,
    preprocessing: Preprocessing,
    most: int,
    draws: int,
    path: Path,
) -> np.ndarray:
    """The same of images shifted by up to ``most`` px and mirrored, for training with labels.

    Returns:
        float16 [draws * N, C, h, w].
    """
    p = preprocessing

    def augment(batch: Tensor, _: int, own: torch.Generator) -> list[Tensor]:
        return [shift_flip(batch, most, own, p.mean, p.std)]

    return _stored(executor, stage, pixels, augment, 1, p.size, draws, path)[:, 0]


def store_mirrored(
    executor: PlainExecutor, stage: int, pixels: np.ndarray, preprocessing: Preprocessing, path: Path
) -> np.ndarray:
    """The same of the images, and then of their mirror images, for distillation: float16 [2 * N, C, h, w]."""
    p = preprocessing

    def augment(batch: Tensor, draw: int, _: torch.Generator) -> list[Tensor]:
        return [normalize((batch.flip(3) if draw else batch).float().div_(255), p.mean, p.std)]

    return _stored(executor, stage, pixels, augment, 1, p.size, 2, path)[:, 0]


def _stored(
    executor: PlainExecutor,
    stage: int,
    pixels: np.ndarray,
    augment: Augment,
    count: int,
    side: int,
    draws: int,
    path: Path,
) -> np.ndarray:
    device = executor.backbone.weights.device
    executor.swap(None)

    def features(first: int) -> np.ndarray:
        """Rows from ``first`` to the end of its batch; no batch spans two draws, so resuming changes nothing."""
        draw, row = divmod(first, len(pixels))
        begin = row // BATCH * BATCH
        batch = torch.from_numpy(pixels[begin : begin + BATCH].copy()).to(device)
        views = augment(batch, draw, generator(draw, begin, side))
        out = executor.run(torch.cat(views), 0, stage).unflatten(0, (count, -1)).transpose(0, 1)
        return out[row - begin :].half().cpu().numpy()

    def rows(done: int) -> Iterable[np.ndarray]:
        while done < draws * len(pixels):
            some = features(done)
            yield from some
            done += len(some)

    shape = (draws * len(pixels), *features(0).shape[1:])
    return stored(path.with_name(f"{path.name}-{side}px.npy"), shape, np.dtype("<f2"), rows)
