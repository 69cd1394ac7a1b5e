"""The training loop for dispatcher, experts, controls and supervised masks. It resumes bit for bit.

Everything random in step ``t`` comes from ``(seed, t)``, so a checkpoint needs only tensors and a step number: a run
that is killed at any time and restarted ends with the same masks as an uninterrupted one.
"""

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import parametrize

from cascade.errors import CascadeError
from training import distributed
from training.checkpoint import BEST, CHECKPOINT, DONE, best_score, restore, store
from training.curve import CURVE, Curve, problems
from training.data.dataset import batches
from training.masking import MaskedModel
from training.objectives import PIECE, Batch, Objective
from training.optimizers import channel_rate, make_optimizers, schedule, score_rate, set_rates
from training.recipe import Recipe

Part = tuple[Tensor, np.ndarray, int]
"""A part of a batch: uint8 [B, 3, S, S], row numbers int64 [B], and the number of its first piece."""
VALIDATED = (0.5, 0.7, 0.85, 1.0)  # shares of the steps at which checkpoints compete on validation images


class Progress(Protocol):
    """Receives the progress of a training."""

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
    validate: Callable[[], tuple[float, float]] | None = None,
) -> None:
    """Train ``model`` for ``steps`` steps, or resume from the checkpoint in ``folder``.

    Args:
        name: of the mask, for messages.
        pixels: uint8 [N, 3, S, S], the training images.
        lr: overrides ``score_rate`` (0 for the control).
        rows: the images to train on; default: all.
        every: steps between checkpoints.
        validate: the current model's accuracy on validation images and its standard error. Of a few checkpoints the
            last one is kept that is within one standard error of the best: few images can't tell a half-trained
            model from a finished one.

    Raises:
        CascadeError: the loss rises from the start, or becomes NaN or infinite.
    """
    rows = np.arange(len(pixels)) if rows is None else rows
    rate = score_rate(recipe, steps) if lr is None else lr
    device = next(model.model.parameters()).device
    optimizers = make_optimizers(model, objective, recipe, rate, channel_rate(recipe, steps) if rate else 0.0)
    rates = {kind: o.param_groups[0]["initial_lr"] for kind, o in optimizers.items()}
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.amp == "fp16")
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / DONE).exists():
        restore(folder / DONE, model, objective, {}, scaler)
        return
    begin = 0
    if (folder / CHECKPOINT).exists():
        begin = restore(folder / CHECKPOINT, model, objective, optimizers, scaler)
    leads = distributed.rank() == 0
    head_steps = objective.head_steps(steps)
    checked = {max(1, round(share * steps)) for share in VALIDATED} if validate else set[int]()
    curve = Curve(folder / CURVE if leads else Path(os.devnull), begin)
    order = batches(len(rows), recipe.batch, seed=recipe.seed, start_step=begin)
    loaded = _load_ahead(pixels, rows, order, recipe, device)
    try:
        for step, parts in zip(range(begin, steps), loaded, strict=False):
            progress = step / steps
            unfrozen = step - head_steps if head_steps else None
            set_rates(optimizers, schedule(progress, objective.warmup(steps)), unfrozen)
            model.head_only = step < head_steps
            if recipe.progressive:
                model.progress(1 - progress * (1 - recipe.share))
            loss = _step(model, objective, optimizers, scaler, parts, recipe, step, progress)
            if not np.isfinite(loss):
                raise _diverged(f"the loss of {name} became {loss} at step {step}", rate, folder)
            if watch is not None and leads:
                watch(name, step + 1, steps, loss)
            line: dict[str, Any] = {"step": step, "loss": round(loss, 6)}
            detailed = (step + 1) % every == 0 or step + 1 == steps or step + 1 in checked
            if detailed:
                line |= _details(model, objective, optimizers, curve, step)
                if wrong := problems(model, line, recipe, curve.steps_since(step) * recipe.batch):
                    line["warnings"] = wrong
                    if leads:
                        curve.warn(name, step, wrong)
            if step + 1 in checked and validate is not None:
                score, error = validate()
                line["validation"] = round(score, 6)
                best = max(score, best_score(folder / BEST))
                if leads and score >= best - error:
                    store(folder / BEST, model, objective, {}, scaler, step + 1, best)
            curve.write(line)
            if objective.falls:
                curve.check_rise(name, head_steps, rates)
            if not detailed:
                continue
            curve.flush(step)
            if not _finite(model, objective):
                raise _diverged(f"{name} became NaN or infinite after step {step}", rate, folder)
            if step + 1 < steps and leads:
                store(folder / CHECKPOINT, model, objective, optimizers, scaler, step + 1)
    finally:
        curve.close()
        loaded.close()
    if leads:
        if (folder / BEST).exists():
            restore(folder / BEST, model, objective, {}, scaler)
        store(folder / DONE, model, objective, {}, scaler, steps)
        (folder / CHECKPOINT).unlink(missing_ok=True)
        (folder / BEST).unlink(missing_ok=True)
    distributed.wait()


def _step(
    model: MaskedModel,
    objective: Objective,
    optimizers: dict[str, torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
    parts: Sequence[Part],
    recipe: Recipe,
    step: int,
    progress: float,
) -> float:
    """Step all optimizers on a batch, and return the mean loss over all processes."""
    model.train()
    objective.before(progress)
    for optimizer in optimizers.values():
        optimizer.zero_grad(set_to_none=True)
    loss = torch.zeros(1, device=parts[0][0].device)
    for pixels, rows, first in parts:
        generators = [generator(recipe.seed, step, piece) for piece in range(first, first + -(-len(pixels) // PIECE))]
        with parametrize.cached():  # crops of all sizes share one masked weight
            part = objective.loss(model, Batch(pixels, rows, progress, generators)) / len(parts)
        scaler.scale(part).backward()
        loss += part.detach()
    trained = [p for o in optimizers.values() for g in o.param_groups for p in g["params"]]
    distributed.average([loss, *(p.grad for p in trained if p.grad is not None)])
    if torch.isfinite(loss):
        for optimizer in optimizers.values():
            if any(p.grad is not None for g in optimizer.param_groups for p in g["params"]):
                scaler.step(optimizer)
        scaler.update()
        if recipe.train_norms:
            distributed.average(model.norms.values())
    return loss.item()


def _details(
    model: MaskedModel,
    objective: Objective,
    optimizers: dict[str, torch.optim.Optimizer],
    curve: Curve,
    step: int,
) -> dict[str, Any]:
    """Details for the curve about the steps since its last detailed line."""
    first = next(iter(optimizers.values()))
    facts = {"lr": first.param_groups[0]["lr"], "active": round(model.active(), 6)} | objective.facts()
    return facts | {"steps_per_s": curve.rate(step)}


def _load_ahead(
    pixels: np.ndarray, rows: np.ndarray, order: Iterator[np.ndarray], recipe: Recipe, device: torch.device
) -> Generator[list[Part], None, None]:
    """Prefetch this process's parts of each batch: a thread reads and moves them to the device one step ahead."""
    rank, world = distributed.rank(), distributed.world()
    size = recipe.batch // (recipe.accumulate * world)
    if size * recipe.accumulate * world != recipe.batch or (size % PIECE and size != recipe.batch):
        raise CascadeError(
            f"a batch of {recipe.batch} can't be cut into {recipe.accumulate} parts for {world} processes:"
            f" each must have a multiple of {PIECE} images"
        )

    def load() -> list[Part]:
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


def _finite(model: MaskedModel, objective: Objective) -> bool:
    """Whether everything trained is finite: a step may produce NaN although its loss was finite."""
    trained = [*model.learned.values(), *model.norms.values(), *objective.module.parameters()]
    return all(bool(t.isfinite().all()) for t in trained)


def _diverged(what: str, lr: float, folder: Path) -> CascadeError:
    return CascadeError(
        f"{what}: start again in another --run with a lower --lr (now {lr:g});"
        f" the last good checkpoint, if there was one, is in {folder}"
    )


def generator(*key: int) -> torch.Generator:
    """A generator seeded by a key, which is hashed to the 32 bits of a seed that a CPU generator uses."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def seed_everything(seed: int) -> None:
    """Seed everything drawn before the loop: heads and prototypes."""
    torch.manual_seed(seed)
