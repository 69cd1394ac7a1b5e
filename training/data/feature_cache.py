"""Cached trunk features of augmented views, computed once and trained on many times.

If masks begin at a late stage, everything before it is frozen and the same for dispatcher, experts, controls
and seeds. A step on stored trunk features only runs the tail. The price is that each image has a fixed number of
augmentations, ``draws``, instead of a new one every time.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from cascade.engine.executors.plain import PlainExecutor
from cascade.errors import CascadeError
from cascade.model.preprocessing import Preprocessing
from training.data.array_cache import stored
from training.data.augment import SIGMA_SIDE, Crop, multi_crop
from training.loop import generator

BATCH = 64


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
    blur = crops[0][1] / SIGMA_SIDE  # one blur for all sizes, as in a live multi-crop
    return [_store_group(executor, stage, pixels, preprocessing, crop, blur, draws, path) for crop in crops]


def _store_group(
    executor: PlainExecutor,
    stage: int,
    pixels: np.ndarray,
    preprocessing: Preprocessing,
    crop: Crop,
    blur: float,
    draws: int,
    path: Path,
) -> np.ndarray:
    count, side, _ = crop
    device = executor.backbone.weights.device
    executor.swap(None)

    def features(first: int) -> np.ndarray:
        """Rows from ``first`` to the end of its batch; no batch spans two draws, so resuming changes nothing."""
        begin = first % len(pixels) // BATCH * BATCH
        batch = torch.from_numpy(pixels[begin : begin + BATCH].copy()).to(device)
        p, own = preprocessing, generator(first // len(pixels), begin, side)
        views = multi_crop(batch, (crop,), generator=own, mean=p.mean, std=p.std, blur=blur)
        out = executor.run(torch.cat(views), 0, stage).unflatten(0, (count, -1)).transpose(0, 1)
        return out[first % len(pixels) - begin :].half().cpu().numpy()

    def rows(done: int) -> Iterable[np.ndarray]:
        while done < draws * len(pixels):
            some = features(done)
            yield from some
            done += len(some)

    shape = (draws * len(pixels), *features(0).shape[1:])
    return stored(path.with_name(f"{path.name}-{side}px.npy"), shape, np.dtype("<f2"), rows)
