"""How far TF32 and bfloat16 move a bundle's embeddings, for its card: a GPU may serve it in either.

Both are measured on held-out images, where the bundle is made: bfloat16 on any device, TF32 only on a GPU.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from cascade.bundle.bundle import Bundle
from cascade.engine.executors.plain import PlainExecutor
from cascade.engine.executors.precision import Precision, bf16, exact, tf32
from cascade.model.router import route
from training import embed

IMAGES = 64


def measure(bundle: Bundle, executor: PlainExecutor, pixels: np.ndarray) -> dict[str, dict[str, float]]:
    """Compare the embeddings of the default mode, and the labels, with those in float32.

    Args:
        executor: of the bundle's backbone.
        pixels: held-out images, uint8 [N, 3, S, S], of which the first 64 are used.

    Returns:
        by precision: number of images, mean and least cosine, and the share of other labels if there is a head.
    """
    found: dict[str, dict[str, float]] = {}
    pixels = pixels[:IMAGES]
    wanted = _embeddings(bundle, executor, pixels, exact)
    for name, precision in {"tf32": tf32, "bf16": bf16}.items():
        if name == "tf32" and not executor.backbone.weights.is_cuda:
            continue
        got = _embeddings(bundle, executor, pixels, precision)
        cosine = cosine_similarity(got, wanted)
        found[name] = {"images": len(pixels), "cosine": _rounded(cosine.mean()), "least": _rounded(cosine.min())}
        if head := bundle.linear.get(bundle.card.mode):
            other = head.scores(got).argmax(dim=1) != head.scores(wanted).argmax(dim=1)
            found[name]["other_labels"] = _rounded(other.float().mean())
    return found


def _embeddings(bundle: Bundle, executor: PlainExecutor, pixels: np.ndarray, precision: Precision) -> Tensor:
    """Embeddings of the default mode, float32 [N, dim]."""
    executor.precision = precision
    try:
        inputs = embed.normalized(pixels, bundle.preprocessing)
        first, *others = torch.from_numpy(embed.blocks(executor, bundle.masks, inputs))
    finally:
        executor.precision = exact
    mode = bundle.card.mode
    fusion, (cluster, _) = bundle.fusions[mode], route(bundle.router, bundle.calibration, first)
    embeddings = fusion.embed(first)
    for k, features in enumerate(others if mode != "dispatcher" else []):
        takes = (cluster == k) | (mode == "unconditional")
        embeddings = embeddings + takes[:, None] * fusion.project(features, k)
    return embeddings


def _rounded(value: Tensor) -> float:
    return round(float(value), 5)
