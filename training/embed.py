"""Features of whole image sets in evaluation mode, with the runtime's own masks and preprocessing."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cascade.engine.executors.plain import PlainExecutor
from cascade.model.masks import Mask
from cascade.model.preprocessing import Preprocessing
from training.data.array_cache import stored
from training.data.dataset import Images
from training.data.scan import threaded

BATCH = 128


def cropped(images: Iterable[Image.Image], preprocessing: Preprocessing) -> np.ndarray:
    """Images as the evaluation transform crops them, uint8 [N, 3, S, S], not kept."""
    crop = preprocessing.geometry()
    return np.stack([np.asarray(crop(image)).transpose(2, 0, 1) for image in images])


def pixels(images: Images, preprocessing: Preprocessing, path: Path) -> np.ndarray:
    """All images, cropped by the evaluation transform, uint8 [N, 3, S, S], decoded once and cached at ``path``."""
    crop, size = preprocessing.geometry(), preprocessing.size

    def one(i: int) -> np.ndarray:
        return np.asarray(crop(images.open(i))).transpose(2, 0, 1)

    everything = range(len(images))
    shape = (len(images), 3, size, size)
    return stored(path, shape, np.dtype("u1"), lambda done: threaded(one, everything[done:], "decoding"))


def batches(images: Images, preprocessing: Preprocessing, size: int = BATCH) -> Iterator[Tensor]:
    """Yield the network's inputs, float32 [<= size, 3, S, S], decoded in threads and not cached."""
    transform = preprocessing.transform()
    for begin in range(0, len(images), size):
        rows = range(begin, min(begin + size, len(images)))
        yield torch.stack(list(threaded(lambda i: transform(images.open(i)), rows, "decoding")))


def normalized(pixels: np.ndarray, preprocessing: Preprocessing, size: int = BATCH) -> Iterator[Tensor]:
    """Yield the network's inputs, float32 [<= size, 3, S, S], from pixels uint8 [N, 3, S, S], in order."""
    for begin in range(0, len(pixels), size):
        yield preprocessing.normalize(pixels[begin : begin + size])


def frozen(executor: PlainExecutor, inputs: Iterator[Tensor]) -> np.ndarray:
    """Features of the plain backbone, float32 [N, F]."""
    executor.swap(None)
    return np.concatenate([executor.run(x.to(executor.backbone.weights.device)).cpu().numpy() for x in inputs])


def blocks(executor: PlainExecutor, masks: Sequence[Mask], inputs: Iterator[Tensor]) -> np.ndarray:
    """Features under each mask, float32 [masks, N, F]; the first is the dispatcher, whose trunk the rest share."""
    dispatcher, experts = masks[0], masks[1:]
    split = min((m.start for m in experts), default=dispatcher.start)
    parts = []
    for x in inputs:
        executor.swap(dispatcher)
        trunk = executor.run(x.to(executor.backbone.weights.device), 0, split)
        rows = [executor.run(trunk, split)]
        for expert in experts:
            executor.swap(expert)
            rows.append(executor.run(trunk, expert.start))
        parts.append(torch.stack(rows).cpu().numpy())
    executor.swap(None)  # trainings copy the model, and must not start from the channels of a mask
    return np.concatenate(parts, axis=1)
