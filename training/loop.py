"""The training loop: one function for dispatcher, experts, controls and supervised masks, resumable to the bit.

Everything random in step ``t`` comes from ``(seed, t)``, so a checkpoint needs tensors and a step number
only: a run that was killed at any moment and started again ends with the same masks as an undisturbed one.
"""

import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from math import cos, pi
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cascade.bundle import sync_folder
from cascade.errors import CascadeError
from cascade.images import Preprocessing
from training.augment import crop_flip, multi_crop
from training.data import batches
from training.masking import MaskedModel
from training.recipe import Recipe
from training.swav import Projector, push, sinkhorn, swapped_loss

CHECKPOINT, DONE, CURVE = "checkpoint.safetensors", "done.safetensors", "curve.jsonl"
SPARSE = 0.05  # a tensor with less active than this is on its way to being off


class Objective(Protocol):
    """A loss with parameters of its own."""

    @property
    def module(self) -> nn.Module: ...

    def loss(
        self,
        model: MaskedModel,
        pixels: Tensor,
        rows: np.ndarray,
        progress: float,
        generator: torch.Generator,
    ) -> Tensor:
        """Loss of one batch. pixels: uint8 [B, 3, S, S]; rows: their numbers; progress: in [0, 1)."""
        ...

    def before(self, progress: float) -> None:
        """Called before each step."""
        ...


class SelfSupervised:
    """SwAV with multi-crop and queue (paper §3.2; method.md §2).

    Args:
        views: stored trunk features to train on instead of the pixels, see ``training.views``.
    """

    def __init__(
        self,
        recipe: Recipe,
        features: int,
        preprocessing: Preprocessing,
        views: Sequence[np.ndarray] | None = None,
    ) -> None:
        self.recipe, self.preprocessing, self.views = recipe, preprocessing, views
        self.module = Projector(features, recipe.projection, recipe.prototypes)
        self.module.register_buffer("queue", torch.zeros(2, recipe.queue, recipe.projection))
        self.module.register_buffer("filled", torch.zeros(1, dtype=torch.int64))

    def before(self, progress: float) -> None:
        self.module.renormalise()
        self.module.prototypes.requires_grad_(progress >= self.recipe.freeze_prototypes)

    def loss(
        self,
        model: MaskedModel,
        pixels: Tensor,
        rows: np.ndarray,
        progress: float,
        generator: torch.Generator,
    ) -> Tensor:
        z: list[Tensor] = []
        for count, x in self._trunk(model, pixels, rows, generator):
            z += self.module(model.tail(x)).chunk(count)
        prototypes = self.module.prototypes
        scores = [v @ prototypes.T for v in z]
        codes = [self._code(i, z[i], scores[i], progress) for i in range(2)]
        queue: Tensor = self.module.queue  # type: ignore[assignment]
        queue.copy_(push(queue, torch.stack([z[0].detach(), z[1].detach()])))
        self.module.filled += len(pixels)  # type: ignore[operator, assignment]
        return swapped_loss(scores, codes, self.recipe.temperature)

    def _trunk(
        self, model: MaskedModel, pixels: Tensor, rows: np.ndarray, generator: torch.Generator
    ) -> Iterator[tuple[int, Tensor]]:
        """(crops, their trunk features [crops * B, C, h, w], crop by crop) of each size."""
        r, p = self.recipe, self.preprocessing
        if self.views is None:
            groups = r.crops(p.size)
            views = multi_crop(pixels, groups, generator=generator, mean=p.mean, std=p.std)
            for count, _, _ in groups:
                yield count, model.trunk(torch.cat([views.pop(0) for _ in range(count)]))
            return
        draws = torch.randint(r.draws, (len(rows),), generator=generator).numpy()
        for group in self.views:
            images = len(group) // r.draws
            stored = torch.from_numpy(group[draws * images + rows]).to(pixels.device).float()
            yield stored.shape[1], stored.transpose(0, 1).flatten(0, 1)

    def _code(self, view: int, z: Tensor, scores: Tensor, progress: float) -> Tensor:
        """Sinkhorn over the batch, and over the queue once it is full and its time has come."""
        r = self.recipe
        everything = scores.detach()
        if progress >= r.queue_from and int(self.module.filled) >= r.queue > 0:  # type: ignore[arg-type]
            queue: Tensor = self.module.queue[view]  # type: ignore[index]
            everything = torch.cat([everything, queue @ self.module.prototypes.detach().T])
        return sinkhorn(everything, r.epsilon, r.iterations)[: len(scores)]


class Supervised:
    """Cross-entropy with a new linear head on crops and flips (method.md §2)."""

    def __init__(self, recipe: Recipe, features: int, preprocessing: Preprocessing, labels: np.ndarray) -> None:
        self.recipe, self.preprocessing = recipe, preprocessing
        self.labels = torch.from_numpy(labels)
        self.module = nn.Linear(features, int(labels.max()) + 1)

    def before(self, progress: float) -> None:
        pass

    def loss(
        self,
        model: MaskedModel,
        pixels: Tensor,
        rows: np.ndarray,
        progress: float,
        generator: torch.Generator,
    ) -> Tensor:
        p = self.preprocessing
        x = crop_flip(pixels, p.size, self.recipe.global_scale, generator, p.mean, p.std)
        logits = self.module(model.tail(model.trunk(x)))
        return cross_entropy(logits, self.labels[rows].to(logits.device))


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
    optimizers = _optimizers(model, objective, recipe, rate)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / DONE).exists():
        _restore(folder / DONE, model, objective, [])
        return
    begin = _restore(folder / CHECKPOINT, model, objective, optimizers) if (folder / CHECKPOINT).exists() else 0
    curve = _keep_curve(folder / CURVE, begin)
    device = next(model.model.parameters()).device
    order = batches(len(rows), recipe.batch, seed=recipe.seed, start_step=begin)
    warned: set[str] = set()
    with open(curve, "a") as log:
        for step in range(begin, steps):
            progress = step / steps
            for group in (g for o in optimizers for g in o.param_groups):
                group["lr"] = group["initial_lr"] * 0.5 * (1 + cos(pi * progress))
            chosen = rows[next(order)]
            batch = torch.from_numpy(pixels[chosen]).to(device)
            model.train()
            objective.before(progress)
            loss = objective.loss(model, batch, chosen, progress, generator(recipe.seed, step))
            if not torch.isfinite(loss):
                raise _diverged(f"the loss of {name} became {loss.item()} at step {step}", rate, folder)
            for o in optimizers:
                o.zero_grad(set_to_none=True)
            loss.backward()
            for o in optimizers:
                o.step()
            log.write(json.dumps({"step": step, "loss": round(loss.item(), 6)}) + "\n")
            if watch is not None:
                watch(name, step + 1, steps, loss.item())
            if (step + 1) % every and step + 1 < steps:
                continue
            for parameter, share in model.sparse(SPARSE):
                if parameter not in warned:
                    warned.add(parameter)
                    warnings.warn(f"{name}: only {share:.1%} of {parameter} is active: lower --lr", stacklevel=2)
            log.flush()
            if not _finite(model, objective):
                raise _diverged(f"{name} is not finite any more after step {step}", rate, folder)
            if step + 1 < steps:
                _store(folder / CHECKPOINT, model, objective, optimizers, step + 1)
    _store(folder / DONE, model, objective, [], steps)
    (folder / CHECKPOINT).unlink(missing_ok=True)


def _finite(model: MaskedModel, objective: Objective) -> bool:
    """Whether everything that is trained is: a step may break it though its loss was finite."""
    trained = [*model.scores.values(), *model.norms.values(), *objective.module.parameters()]
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


def _optimizers(model: MaskedModel, objective: Objective, recipe: Recipe, lr: float) -> list[torch.optim.Optimizer]:
    """The scores' (no weight decay, ever: Theorem 1 needs that) and that of head and prototypes."""
    scores = list(model.scores.values())
    kinds = {
        "adam": lambda: torch.optim.Adam(scores, lr=lr),
        "sgd": lambda: torch.optim.SGD(scores, lr=lr, momentum=0.9),
    }
    own = list(objective.module.parameters())
    head = torch.optim.SGD(own, lr=recipe.head_lr, momentum=0.9, weight_decay=recipe.head_decay)
    both = [kinds[recipe.optimizer](), head]
    for optimizer in both:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return both


def _store(
    path: Path, model: MaskedModel, objective: Objective, optimizers: list[torch.optim.Optimizer], step: int
) -> None:
    """All state as one safetensors file, written beside, synced and renamed."""
    tensors = {f"scores.{n}": t.detach() for n, t in model.scores.items()}
    tensors |= {f"norms.{n}": t for n, t in model.norms.items()}
    tensors |= {f"objective.{n}": t for n, t in objective.module.state_dict().items()}
    for i, optimizer in enumerate(optimizers):
        for key, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{key}.{n}": t for n, t in state.items() if t is not None}
    temporary = path.with_suffix(".tmp")
    save_file({n: t.contiguous().cpu().clone() for n, t in tensors.items()}, temporary, {"step": str(step)})
    with open(temporary, "rb") as handle:
        os.fsync(handle.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def _restore(path: Path, model: MaskedModel, objective: Objective, optimizers: list[torch.optim.Optimizer]) -> int:
    """The inverse of ``_store``; returns the step."""
    with safe_open(path, "pt") as handle:
        step = int(handle.metadata()["step"])
    tensors = load_file(path)
    model.load(under(tensors, "scores."), under(tensors, "norms."))
    objective.module.load_state_dict(under(tensors, "objective."))
    for i, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in under(tensors, f"optimizer.{i}.").items():
            key, _, field = name.partition(".")
            state.setdefault(int(key), {})[field] = tensor
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    return step


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries whose name begins with ``prefix``, without it."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _keep_curve(path: Path, begin: int) -> Path:
    """Drop the lines of steps that will be made again."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] < begin))
        temporary.replace(path)
    return path
