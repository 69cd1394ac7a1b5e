"""The teacher's features for distillation, computed once for all images and their mirror images, and cached.

The teacher is the frozen backbone at a larger input size, or any other timm model.
"""

from collections.abc import Iterator

import numpy as np
import torch

from cascade.engine.executors.plain import PlainExecutor
from cascade.engine.weight_cache import WeightCache
from cascade.errors import CascadeError
from cascade.model import backbone as backbones
from cascade.model.backbone import Backbone
from cascade.model.preprocessing import Preprocessing
from training import embed
from training.data.array_cache import stored
from training.run import Run, Split, device, hash_of

BATCH = 64


def features(run: Run) -> np.ndarray:
    """The teacher's features of the training images and of their mirror images, float16 [2, N, F]."""
    backbone, preprocessing = load(run)
    pixels = run.inputs("train", preprocessing)
    key = [backbone.fingerprint, run.images.fingerprint(), preprocessing.to_json()]
    count = len(pixels)

    def rows(done: int) -> Iterator[np.ndarray]:
        run.watch.say(f"teacher features of {count} images at {preprocessing.size} px, and of their mirror images")
        executor = PlainExecutor(backbone, WeightCache(2**20))
        while done < 2 * count:
            mirrored, first = divmod(done, count)
            chosen = pixels[first : min(count, first + BATCH)]
            some = _embed(executor, chosen[..., ::-1] if mirrored else chosen, preprocessing)
            yield from some.astype(np.float16)
            done += len(some)
            run.watch("teacher", done, 2 * count, 0.0)

    path = run.cache / f"teacher-{hash_of(key)}.npy"
    return stored(path, (2 * count, backbone.features), np.dtype("<f2"), rows).reshape(2, count, backbone.features)


def evaluation_features(run: Run, split: Split) -> np.ndarray:
    """The teacher's features of a split, float32 [N, F]."""
    backbone, preprocessing = load(run)
    if split == "train":
        return np.asarray(features(run)[0], np.float32)
    executor = PlainExecutor(backbone, WeightCache(2**20))
    return _embed(executor, run.inputs(split, preprocessing), preprocessing)


def load(run: Run) -> tuple[Backbone, Preprocessing]:
    """The teacher and its preprocessing: by default the run's own backbone at twice the size."""
    recipe = run.recipe
    size = recipe.teacher_size or 2 * run.preprocessing.size
    if not recipe.teacher:
        if size <= run.preprocessing.size:
            raise CascadeError(
                f"--teacher-size {size} is no larger than --size {run.preprocessing.size}, and the teacher is the same"
                " backbone: give a larger --teacher-size or another --teacher"
            )
        return run.backbone, Preprocessing.of(run.backbone.config, size, recipe.crop_pct or None)
    name, _, file = recipe.teacher.partition("=")
    backbone = backbones.load(name, f"file:{file}" if file else "timm", device=device())
    return backbone, Preprocessing.of(backbone.config, recipe.teacher_size or None)


def is_same_network(run: Run) -> bool:
    """Whether student and teacher are the same backbone, so that their features are comparable."""
    return not run.recipe.teacher or load(run)[0].fingerprint == run.backbone.fingerprint


@torch.inference_mode()
def _embed(executor: PlainExecutor, pixels: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    return embed.frozen(executor, embed.normalized(pixels, preprocessing, BATCH))
