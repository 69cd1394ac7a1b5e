"""Checkpoints: the state of a training as one safetensors file, from which it resumes bit for bit."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from cascade import atomic
from cascade.bundle.format import strip_prefix
from training.masking import MaskedModel
from training.objectives import Objective

CHECKPOINT, DONE, BEST = "checkpoint.safetensors", "done.safetensors", "best.safetensors"


def store(
    path: Path,
    model: MaskedModel,
    objective: Objective,
    optimizers: dict[str, torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
    step: int,
    score: float | None = None,
) -> None:
    """Write a checkpoint atomically; ``score`` is the best accuracy on validation images so far, if measured."""
    tensors = model.state()
    tensors |= {f"objective.{n}": t for n, t in objective.module.state_dict().items()}
    tensors |= {f"scaler.{n}": torch.tensor(float(v)) for n, v in scaler.state_dict().items()}
    for kind, optimizer in optimizers.items():
        for key, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{kind}.{key}.{n}": t for n, t in state.items() if t is not None}
    metadata = {"step": str(step)} | ({} if score is None else {"score": repr(score)})
    with atomic.file(path, alone=True) as temporary:  # save_file would write beside it under a name of its own
        temporary.write_bytes(save({n: t.contiguous().cpu().clone() for n, t in tensors.items()}, metadata))


def restore(
    path: Path,
    model: MaskedModel,
    objective: Objective,
    optimizers: dict[str, torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
) -> int:
    """Load a checkpoint written by ``store``, and return its step."""
    with safe_open(path, "pt") as handle:
        step = int(handle.metadata()["step"])
    tensors = load_file(path)
    model.load_state(tensors)
    objective.module.load_state_dict(strip_prefix(tensors, "objective."))
    if scale := {n: t.item() for n, t in strip_prefix(tensors, "scaler.").items()}:
        scaler.load_state_dict(scale | {"growth_interval": int(scale["growth_interval"])})
    for kind, optimizer in optimizers.items():
        state: dict[int, dict[str, Any]] = {}
        for name, tensor in strip_prefix(tensors, f"optimizer.{kind}.").items():
            key, _, field = name.partition(".")
            state.setdefault(int(key), {})[field] = tensor
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    return step


def best_score(path: Path) -> float:
    """The validation score of the best checkpoint so far; minus infinity without one."""
    if not path.exists():
        return float("-inf")
    with safe_open(path, "pt") as handle:
        return float(handle.metadata()["score"])
