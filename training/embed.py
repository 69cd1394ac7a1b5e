"""Features of whole image sets, in evaluation mode, through the runtime's own masks and preprocessing."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from cascade.engine.executors.plain import PlainExecutor
from cascade.model.masks import Mask
from cascade.model.preprocessing import Preprocessing
from training.data.dataset import Images


def batches(images: Images, preprocessing: Preprocessing, size: int = 128) -> Iterator[Tensor]:
    """Evaluation inputs, float32 [<= size, 3, S, S], in order."""
    transform = preprocessing.transform()
    for begin in range(0, len(images), size):
        yield torch.stack([transform(images.open(i)) for i in range(begin, min(begin + size, len(images)))])


def frozen(executor: PlainExecutor, inputs: Iterator[Tensor]) -> np.ndarray:
    """The plain backbone's features, float32 [N, F]."""
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
    return np.concatenate(parts, axis=1)
