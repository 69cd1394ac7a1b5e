"""Experts with labels: ``cascade train photos/ --labels --clusters K``.

Images are clustered without labels, by the frozen backbone's features; each cluster gets an expert, a mask with its own
head. The control is one mask trained on everything for the same steps. The experts are served only if they beat it.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from cascade.bundle.format import strip_prefix
from cascade.model.fusion import Fusion, Mode, SlotBias
from cascade.model.heads import Linear
from training import clusters, comparison, dispatcher, experts, heads
from training.comparison import Row, compressed
from training.evaluate import Features, collect
from training.frozen import Candidate, candidate_of, frozen_head, trained_head
from training.fusion import Fitted
from training.run import Run, write_json

JOINT, EXPERTS = "equal-steps", "experts"
TITLES = {
    "frozen": "frozen backbone, linear head",
    JOINT: "one mask for all clusters",
    EXPERTS: "an expert per cluster",
}


def train(run: Run) -> None:
    """Train experts and control; a dispatcher of no steps is the frozen backbone."""
    dispatcher.train(run, steps=0)
    clusters.fit(run)
    experts.train(run)
    dispatcher.train(run, JOINT, steps=run.expert_steps * run.recipe.clusters)


def compare(run: Run) -> tuple[Candidate, dict[str, Any]]:
    """The best of frozen head, control and experts on the validation images, and the facts about all for the card."""
    frozen, joint, routed = frozen_head(run), trained_head(run, JOINT), _routed(run, collect(run))
    chosen = joint if joint.beats(frozen) else frozen
    chosen = routed if routed.beats(chosen) else chosen
    weights = {"frozen": frozen.head.weight, JOINT: joint.head.weight, EXPERTS: _heads(run)[0]}
    masks = {"frozen": (), JOINT: (run.mask(JOINT, run.mask_from),), EXPERTS: run.experts}
    rows = {}
    for own in (frozen, joint, routed):
        tensors = {"head": weights[own.name].half()}
        for n, mask in enumerate(masks[own.name]):
            tensors |= {f"{n}.{name}": tensor for name, tensor in comparison.shipped(run, mask).items()}
        rows[TITLES[own.name]] = Row(TITLES[own.name], own.validation, own.test, compressed(tensors)).facts()
    facts: dict[str, Any] = {
        "serves": chosen.name,
        "validation_images": len(run.rows[1]),
        "held_out_images": len(run.held_out),
        "steps": {"experts": run.recipe.clusters * run.expert_steps, "each": run.expert_steps},
        "rows": rows,
    }
    write_json(run.folder / "comparison.json", facts)
    return chosen, facts


def verdict(facts: dict[str, Any]) -> str:
    """One sentence: whether the experts are worth having."""
    joint, routed = facts["rows"][TITLES[JOINT]], facts["rows"][TITLES[EXPERTS]]
    key = "validation" if routed["test"] is None else "test"
    gain = 100 * (routed[key] - joint[key])
    served = f"the bundle serves: {TITLES[facts['serves']]}"
    return f"experts against one mask for the same {facts['steps']['experts']} steps: {gain:+.1f} points; {served}"


def fusions(run: Run, features: Features) -> dict[Mode, Fitted]:
    """Each mode's logits as an embedding, so that each expert has its own head.

    The conditional mode has the logits of the image's expert, the unconditional mode the mean of all experts, and the
    dispatcher those of the frozen head.
    """
    weights, biases = _heads(run)
    frozen = frozen_head(run).head
    padded = torch.cat([torch.zeros_like(weights[:1]), weights]), torch.cat([torch.zeros_like(biases[:1]), biases])
    fitted: dict[Mode, Fusion] = {
        "dispatcher": Fusion(frozen.weight.T[None].half().contiguous(), frozen.bias.float()),
        "conditional": SlotBias(padded[0].half().contiguous(), padded[1]),
        "unconditional": SlotBias((padded[0] / len(weights)).half().contiguous(), padded[1] / len(weights)),
    }
    sides = features.train, features.test
    every = [_logits(weights, biases, blocks) for blocks in sides]  # [K, N, classes]
    routed = [_own(logits, own) for logits, own in zip(every, (features.assigned, features.routed), strict=True)]
    embeddings = {
        "dispatcher": [heads.logits(frozen, blocks[0]) for blocks in sides],
        "conditional": routed,
        "unconditional": [logits.mean(axis=0) for logits in every],
    }
    return {mode: Fitted(own, *map(torch.from_numpy, embeddings[mode])) for mode, own in fitted.items()}


def linear(run: Run, features: Features) -> dict[Mode, Linear]:
    """The heads on these logits: the identity, calibrated."""
    own = _routed(run, features).head
    return {"dispatcher": _identity(len(run.images.classes)), "conditional": own, "unconditional": own}


def _routed(run: Run, features: Features) -> Candidate:
    """The experts as a classifier of their logits."""
    weights, biases = _heads(run)
    sides = (features.train, features.assigned), (features.test, features.routed)
    train, test = (_own(_logits(weights, biases, blocks), own) for blocks, own in sides)
    return candidate_of(run, EXPERTS, _identity(train.shape[1]), train, test)


def _logits(weights: Tensor, biases: Tensor, blocks: np.ndarray) -> np.ndarray:
    """Logits of every expert's head, float32 [K, N, classes], on the blocks of dispatcher and experts."""
    return np.asarray(blocks[1:] @ weights.numpy() + biases.numpy()[:, None])


def _own(logits: np.ndarray, routed: np.ndarray) -> np.ndarray:
    """Those of the expert that each image is routed to, float32 [N, classes]."""
    return logits[routed, np.arange(logits.shape[1])]


def _heads(run: Run) -> tuple[Tensor, Tensor]:
    """The experts' heads: float32 [K, F, classes] and [K, classes]."""
    own = [strip_prefix(run.trained(f"expert-{k}"), "objective.") for k in range(run.recipe.clusters)]
    return torch.stack([head["weight"].T.float() for head in own]), torch.stack([head["bias"].float() for head in own])


def _identity(classes: int) -> Linear:
    return Linear(torch.eye(classes), torch.zeros(classes))
