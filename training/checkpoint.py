"""All that a training holds as one safetensors file, so that it goes on to the bit; and the curve beside it."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cascade import atomic
from cascade.bundle.format import strip_prefix
from training.masking import MaskedModel
from training.objectives import Objective

CHECKPOINT, DONE, CURVE = "checkpoint.safetensors", "done.safetensors", "curve.jsonl"


def store(
    path: Path,
    model: MaskedModel,
    objective: Objective,
    optimizers: list[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
    step: int,
) -> None:
    """All state as one safetensors file."""
    tensors = {f"{model.learns}.{n}": t.detach() for n, t in model.learned.items()}
    tensors |= {f"norms.{n}": t for n, t in model.norms.items()}
    tensors |= {f"objective.{n}": t for n, t in objective.module.state_dict().items()}
    tensors |= {f"scaler.{n}": torch.tensor(float(v)) for n, v in scaler.state_dict().items()}
    for i, optimizer in enumerate(optimizers):
        for key, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{key}.{n}": t for n, t in state.items() if t is not None}
    with atomic.file(path, alone=True) as beside:
        save_file({n: t.contiguous().cpu().clone() for n, t in tensors.items()}, beside, {"step": str(step)})


def restore(
    path: Path,
    model: MaskedModel,
    objective: Objective,
    optimizers: list[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
) -> int:
    """The inverse of ``store``; returns the step."""
    with safe_open(path, "pt") as handle:
        step = int(handle.metadata()["step"])
    tensors = load_file(path)
    model.load(strip_prefix(tensors, f"{model.learns}."), strip_prefix(tensors, "norms."))
    objective.module.load_state_dict(strip_prefix(tensors, "objective."))
    if scale := {n: t.item() for n, t in strip_prefix(tensors, "scaler.").items()}:
        scaler.load_state_dict(scale | {"growth_interval": int(scale["growth_interval"])})
    for i, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Any]] = {}
        for name, tensor in strip_prefix(tensors, f"optimizer.{i}.").items():
            key, _, field = name.partition(".")
            state.setdefault(int(key), {})[field] = tensor
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    return step


def keep_curve(path: Path, begin: int) -> Path:
    """Drop the lines of steps that will be made again."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
        with atomic.file(path, alone=True) as beside:
            beside.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] < begin))
    return path
