"""The training loop: one function for dispatcher, experts, controls and supervised masks, resumable to the bit.

Everything random in step ``t`` comes from ``(seed, t)``, so a checkpoint needs tensors and a step number
only: a run that was killed at any moment and started again ends with the same masks as an undisturbed one.
"""

import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from math import cos, pi
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import parametrize

from cascade.errors import CascadeError
from training import distributed
from training.checkpoint import CHECKPOINT, CURVE, DONE, keep_curve, restore, store
from training.data.dataset import batches
from training.masking import MaskedModel
from training.objectives import PIECE, Batch, Objective
from training.recipe import Recipe

SPARSE = 0.05  # a tensor with less active than this is on its way to being off
COLLAPSED = 0.05  # share of the prototypes that images are nearest to where an embedding has lost its directions
CROWDED = 0.8  # share of a batch nearest to one prototype: the same


class Progress(Protocol):
    """What the loop tells whoever watches."""

    def __call__(self, name: str, step: int, steps: int, loss: float) -> None: ...


def fit(
    name: str,
    model: MaskedModel,
    objective: Objective,
    pixels: np.ndarray,
    recipe: Recipe,
    steps: int,
    folder: Path,
    *,
    lr: float | None = None,
    rows: np.ndarray | None = None,
    every: int = 50,
    watch: Progress | None = None,
) -> None:
    """Train the scores of ``model`` for ``steps`` steps; goes on from the last checkpoint in ``folder``.

    Args:
        name: of the mask, for messages.
        pixels: uint8 [N, 3, S, S], the training cache.
        lr: in place of the recipe's (0 for the control).
        rows: the images to train on, all by default.
        every: steps between checkpoints.

    Raises:
        CascadeError: the loss is not finite any more.
    """
    rows = np.arange(len(pixels)) if rows is None else rows
    rate = recipe.lr if lr is None else lr
    device = next(model.model.parameters()).device
    optimizers = _optimizers(model, objective, recipe, rate)
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.amp == "fp16")
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / DONE).exists():
        restore(folder / DONE, model, objective, [], scaler)
        return
    begin = 0
    if (folder / CHECKPOINT).exists():
        begin = restore(folder / CHECKPOINT, model, objective, optimizers, scaler)
    leads = distributed.rank() == 0
    curve = keep_curve(folder / CURVE, begin) if leads else Path(os.devnull)
    order = batches(len(rows), recipe.batch, seed=recipe.seed, start_step=begin)
    learned = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    warned: set[str] = set()
    clock, counted = time.perf_counter(), begin
    with open(curve, "a") as log:
        for step, parts in zip(range(begin, steps), _loaded(pixels, rows, order, recipe, device), strict=False):
            progress = step / steps
            for group in (g for o in optimizers for g in o.param_groups):
                group["lr"] = group["initial_lr"] * schedule(progress, recipe.warmup)
            model.train()
            if recipe.progressive:
                model.progress(1 - progress * (1 - recipe.share))
            objective.before(progress)
            for o in optimizers:
                o.zero_grad(set_to_none=True)
            total = torch.zeros(1, device=device)
            for held, chosen, first in parts:
                generators = [generator(recipe.seed, step, piece) for piece in range(first, first + _pieces(len(held)))]
                with parametrize.cached():  # one masked weight for crops of all sizes
                    loss = objective.loss(model, Batch(held, chosen, progress, generators)) / len(parts)
                scaler.scale(loss).backward()
                total += loss.detach()
            distributed.average([total, *(p.grad for p in learned if p.grad is not None)])
            if not torch.isfinite(total):
                raise _diverged(f"the loss of {name} became {total.item()} at step {step}", rate, folder)
            for o in optimizers:
                scaler.step(o)
            scaler.update()
            if recipe.train_norms:
                distributed.average(model.norms.values())
            line: dict[str, Any] = {"step": step, "loss": round(total.item(), 6)}
            if watch is not None and leads:
                watch(name, step + 1, steps, total.item())
            rest = (step + 1) % every and step + 1 < steps
            if not rest:
                line |= {"lr": optimizers[0].param_groups[0]["lr"], "active": round(model.active(), 6)}
                line |= objective.facts()
                since = step + 1 - counted
                line["steps_per_s"] = round(since / (time.perf_counter() - clock), 3)
                if wrong := _wrong(model, line, recipe, since * recipe.batch):
                    line["warnings"] = wrong
            log.write(json.dumps(line) + "\n")
            if rest:
                continue
            for what in wrong.keys() - warned if leads else ():  # once
                warnings.warn(f"{name}, step {step}: {wrong[what]}", stacklevel=2)
            warned |= wrong.keys()
            log.flush()
            if not _finite(model, objective):
                raise _diverged(f"{name} is not finite any more after step {step}", rate, folder)
            if step + 1 < steps and leads:
                store(folder / CHECKPOINT, model, objective, optimizers, scaler, step + 1)
            clock, counted = time.perf_counter(), step + 1
    if leads:
        store(folder / DONE, model, objective, [], scaler, steps)
        (folder / CHECKPOINT).unlink(missing_ok=True)
    distributed.wait()


def schedule(progress: float, warmup: float = 0.0) -> float:
    """What the learning rates are multiplied with: a linear rise, then half a cosine down to 0 (method.md §2)."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + cos(pi * (progress - warmup) / (1 - warmup))) if warmup < 1 else 1.0


def _pieces(count: int) -> int:
    return -(-count // PIECE)


def _loaded(
    pixels: np.ndarray, rows: np.ndarray, order: Iterator[np.ndarray], recipe: Recipe, device: torch.device
) -> Iterator[list[tuple[Tensor, np.ndarray, int]]]:
    """This process' parts of each step's batch, (uint8 [B, 3, S, S], rows, number of the first piece).

    Read, and brought to the device, in a thread that is one step ahead.
    """
    rank, world = distributed.rank(), distributed.world()
    size = recipe.batch // (recipe.accumulate * world)
    if size * recipe.accumulate * world != recipe.batch or (size % PIECE and size != recipe.batch):
        raise CascadeError(
            f"a batch of {recipe.batch} can't be cut into {recipe.accumulate} parts for {world} processes:"
            f" each must have a multiple of {PIECE} images"
        )

    def load() -> list[tuple[Tensor, np.ndarray, int]]:
        chosen = rows[next(order)]
        begins = [(part * world + rank) * size for part in range(recipe.accumulate)]
        return [(_to(pixels[chosen[b : b + size]], device), chosen[b : b + size], b // PIECE) for b in begins]

    with ThreadPoolExecutor(1, "training-load") as pool:
        coming = pool.submit(load)
        while True:
            ready, coming = coming.result(), pool.submit(load)
            yield ready


def _to(pixels: np.ndarray, device: torch.device) -> Tensor:
    batch = torch.from_numpy(pixels)
    return batch.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else batch


def _wrong(model: MaskedModel, line: Mapping[str, Any], recipe: Recipe, images: int) -> dict[str, str]:
    """What is going wrong, and what to do: by the parameter that is nearly off, or ``embedding``.

    Args:
        images: that the line tells of; few of them can't be nearest to many prototypes.
    """
    found = {}
    if not recipe.share:
        found = {p: f"only {s:.1%} of {p} is active: lower --lr" for p, s in model.sparse(SPARSE)}
    few = max(2.0, COLLAPSED * min(recipe.prototypes, images))
    if "nearest" in line and (line["nearest"] < few or line["largest"] > CROWDED):
        found["embedding"] = (
            f"the images are nearest to {line['nearest']:.1f} of {recipe.prototypes} prototypes, {line['largest']:.0%}"
            " of a batch to the same one, the embedding collapses: lower --lr, or take a larger --batch"
        )
    return found


def _finite(model: MaskedModel, objective: Objective) -> bool:
    """Whether everything that is trained is: a step may break it though its loss was finite."""
    trained = [*model.learned.values(), *model.norms.values(), *objective.module.parameters()]
    return all(bool(t.isfinite().all()) for t in trained)


def _diverged(what: str, lr: float, folder: Path) -> CascadeError:
    return CascadeError(
        f"{what}: start again in another --run with a lower --lr (now {lr:g});"
        f" the last good checkpoint, if there was one, is in {folder}"
    )


def generator(*key: int) -> torch.Generator:
    """Random numbers of their own for every key, hashed to the 32 bits that a generator on the CPU heeds of a seed."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def seed_everything(seed: int) -> None:
    """For what is drawn before the loop: heads and prototypes."""
    torch.manual_seed(seed)


class RmsSGD(torch.optim.SGD):
    """SGD on gradients of root mean square 1, tensor by tensor: they differ a thousandfold between layers."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            p.grad.div_(p.grad.square().mean().sqrt().clamp(min=1e-12))
        return super().step(closure)


def _optimizers(model: MaskedModel, objective: Objective, recipe: Recipe, lr: float) -> list[torch.optim.Optimizer]:
    """The scores' (no weight decay, ever: Theorem 1 needs that) and that of head and prototypes."""
    learned, decay = list(model.learned.values()), model.decay * recipe.weight_decay
    kinds = {
        "adam": lambda: torch.optim.Adam(learned, lr=lr, weight_decay=decay),
        "sgd": lambda: torch.optim.SGD(learned, lr=lr, momentum=0.9, weight_decay=decay),
        "rms-sgd": lambda: RmsSGD(learned, lr=lr, momentum=0.9, weight_decay=decay),
    }
    own = list(objective.module.parameters())
    head = torch.optim.SGD(own, lr=recipe.head_lr, momentum=0.9, weight_decay=recipe.head_decay)
    both = [kinds[recipe.optimizer](), head]
    for optimizer in both:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return both
