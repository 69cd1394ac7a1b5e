"""Optimizers and learning rates, one per kind of trained parameter."""

from collections.abc import Callable
from math import cos, pi

import torch
from torch import nn

from training.masking import MaskedModel
from training.objectives import Objective
from training.recipe import Recipe

WEIGHTS_WARMUP = 100  # steps
LR, MOST_LR, TRAVEL = 0.02, 0.05, 30.0
CHANNEL_LR, LEAST_CHANNEL_LR = 0.002, 0.0005
TRAVEL_TOGETHER, CHANNEL_TRAVEL = 45.0, 0.75  # of scores and channels that are trained together
WEIGHTS_LR = {"labels": 0.001, "distill": 0.0005}  # if every weight is trained
CONTINUED = 0.1  # factor of the rates of SwAV after distillation: at the full ones it undoes that


class RmsSGD(torch.optim.SGD):
    """SGD on gradients scaled to an RMS of 1 per tensor, because layers differ by a factor of a thousand."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            p.grad.div_(p.grad.square().mean().sqrt().clamp(min=1e-12))
        return super().step(closure)


def schedule(progress: float, warmup: float = 0.0) -> float:
    """The factor of the learning rates: linear warm-up, then half a cosine down to 0 (method.md §2).

    Args:
        progress: share of finished steps. warmup: share of warm-up steps.
    """
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + cos(pi * (progress - warmup) / (1 - warmup))) if warmup < 1 else 1.0


def score_rate(recipe: Recipe, steps: int) -> float:
    """Learning rate of the scores, or of all weights, for a training of ``steps`` steps: the recipe's if it has one.

    Adam moves a score by at most its rate in a step, so rate times steps is how far scores can travel. With labels this
    is kept: in a few hundred steps with 0.02 hardly any score would reach the threshold. Scores alone travel less: with
    the rates of those that have scales and shifts beside them, the digits collapsed (decision 17).
    """
    if recipe.lr:
        return recipe.lr * _continued(recipe)
    if recipe.adapt == "delta":
        return WEIGHTS_LR[recipe.kind]
    if recipe.kind != "labels":
        return LR * _continued(recipe)
    return _rate(TRAVEL_TOGETHER if recipe.adapt == "both" else TRAVEL, steps, LR, MOST_LR)


def channel_rate(recipe: Recipe, steps: int) -> float:
    """Learning rate of scales and shifts, for a training of ``steps`` steps: the recipe's if it has one.

    With labels and beside scores it is the lower, the longer the training: in trials that switched more weights off and
    gave more accuracy (decision 17).
    """
    if recipe.channel_lr or (recipe.kind, recipe.adapt) != ("labels", "both"):
        return (recipe.channel_lr or CHANNEL_LR) * _continued(recipe)
    return _rate(CHANNEL_TRAVEL, steps, LEAST_CHANNEL_LR, CHANNEL_LR)


def make_optimizers(
    model: MaskedModel, objective: Objective, recipe: Recipe, lr: float, channel_lr: float
) -> dict[str, torch.optim.Optimizer]:
    """Make the optimizers for ``scores``, ``channels`` or ``weights``, and the objective's ``head``, by these names.

    Scores have no weight decay (required by Theorem 1).

    Args:
        lr: of scores or weights. channel_lr: of scales and shifts.
    """
    optimizers: dict[str, torch.optim.Optimizer] = {}
    for kind, group in model.groups.items():
        parameters = list(group.values())
        if kind == "channels":
            optimizers[kind] = torch.optim.Adam(parameters, lr=channel_lr)
        else:
            decay = recipe.weight_decay if kind == "weights" else 0.0
            name = "adamw" if kind == "weights" and recipe.optimizer == "adam" else recipe.optimizer
            optimizers[kind] = _optimizer(name, parameters, lr, decay)
    if own := list(objective.module.parameters()):
        optimizers["head"] = objective.optimizer(own)
    for optimizer in optimizers.values():
        for settings in optimizer.param_groups:
            settings["initial_lr"] = settings["lr"]
    return optimizers


def set_rates(optimizers: dict[str, torch.optim.Optimizer], factor: float, unfrozen: int | None = None) -> None:
    """Multiply every initial learning rate by ``factor``.

    Args:
        unfrozen: steps since the head was last trained alone; None if it never was. The rate of full weights warms up
            over ``WEIGHTS_WARMUP`` of them: Adam's first steps change every weight by the full rate, which ruins
            networks with depthwise layers.
    """
    for kind, optimizer in optimizers.items():
        rising = 1.0 if unfrozen is None or kind != "weights" else min(1.0, max(0, unfrozen + 1) / WEIGHTS_WARMUP)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor * rising


def _rate(travel: float, steps: int, least: float, most: float) -> float:
    """The rate with which Adam moves a parameter at most this far in ``steps`` steps, within bounds."""
    return max(least, min(most, travel / max(1, steps)))


def _continued(recipe: Recipe) -> float:
    return CONTINUED if recipe.distills_first else 1.0


def _optimizer(name: str, parameters: list[nn.Parameter], lr: float, decay: float) -> torch.optim.Optimizer:
    if name == "adam":
        return torch.optim.Adam(parameters, lr=lr, weight_decay=decay)
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=decay)
    kind = RmsSGD if name == "rms-sgd" else torch.optim.SGD
    return kind(parameters, lr=lr, momentum=0.9, weight_decay=decay)
