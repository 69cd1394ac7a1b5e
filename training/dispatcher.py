"""Stage 1: the first mask, for all images (paper §3.3), and its controls.

python -m training.dispatcher cifar10 --run runs/cifar --size 64
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from cascade.bundle.format import strip_prefix
from cascade.errors import CascadeError
from training import delta, distributed, embed, teacher
from training.cli import RUN, RunFolder, stage, start, with_recipe
from training.loop import fit, seed_everything
from training.masking import MaskedModel
from training.objectives import Distillation, Objective, SelfSupervised, Supervised
from training.recipe import Recipe
from training.run import Run, begin, device, trained

ZERO_STEPS = 20  # with BatchNorm in eval mode only the scores could change, so a few steps are enough


def train(
    run: Run,
    name: str = "dispatcher",
    *,
    model: MaskedModel | None = None,
    steps: int | None = None,
    lr: float | None = None,
    rows: np.ndarray | None = None,
    head: Path | None = None,
) -> None:
    """Train the dispatcher's adapter, or one like it under another name.

    With ``distill+swav`` it starts from the distilled one, which is trained first.

    Args:
        model: the model to train; default: the recipe's, whose delta is also stored if it is to have one.
        rows: the images to train on; default: all except the validation images.
        head: folder of a finished training, whose head this one starts from.
    """
    steps = run.steps if steps is None else steps
    compressed = model is None and run.recipe.adapt == "delta"
    if model is None:
        model = run.masked(run.mask_from)
        if run.distilled is not None:
            train(run.distilled)
            model.load_state(run.distilled.trained("dispatcher"))
    loss = objective(run, head)
    validate = None
    if rows is None:
        rows, validation = run.rows
        validate = _validation(run, model, loss, validation) if len(validation) else None
    fit(
        name + run.suffix,
        model,
        loss,
        run.pixels,
        run.recipe,
        steps,
        run.folder / name,
        lr=lr,
        rows=rows,
        watch=run.watch,
        validate=validate,
    )
    if compressed:
        with distributed.first():
            delta.of_run(run, name)


def controls(run: Run) -> None:
    """Train the controls: the dispatcher for all the steps of the cascade, and at learning rate zero."""
    train(run, "equal-steps", steps=run.steps + run.recipe.clusters * run.recipe.expert_steps)
    zero_rate(run)


def zero_rate(run: Run) -> None:
    """Train the control at learning rate zero: the effect of BatchNorm's statistics alone."""
    train(run, "zero-rate", steps=run.steps if run.recipe.train_norms else ZERO_STEPS, lr=0.0)


def objective(run: Run, head: Path | None = None) -> Objective:
    """The recipe's objective: new, or from a finished training in the folder ``head``."""
    seed_everything(run.recipe.seed)
    recipe, backbone, preprocessing = run.recipe, run.backbone, run.preprocessing
    result: Objective
    views = None if run.views is None else run.views[0]
    if recipe.kind == "swav":
        result = SelfSupervised(recipe, backbone.features, preprocessing, run.views)
    elif recipe.kind == "distill":
        start = None if teacher.is_same_network(run) else run.features("frozen")[0]
        result = Distillation(recipe, preprocessing, teacher.features(run), start, views)
    else:
        if run.images.labels is None:
            raise CascadeError(f"{recipe.data} has no class folders: omit --labels")
        labels, classes = run.images.labels.astype(np.int64), len(run.images.classes)
        result = Supervised(recipe, backbone.features, preprocessing, labels, classes, run.rows[0], views)
    if head:
        result.module.load_state_dict(strip_prefix(trained(head), "objective."))
    result.module.to(device())
    return result


def _validation(run: Run, model: MaskedModel, loss: Objective, rows: np.ndarray) -> Callable[[], tuple[float, float]]:
    """A function that measures the current model's accuracy on the validation images, and its standard error."""
    assert run.images.labels is not None
    truth = run.images.labels[rows]

    @torch.no_grad()
    def accuracy() -> tuple[float, float]:
        model.model.eval()
        answers = [
            loss.module(model.tail(model.trunk(x.to(device())))).argmax(dim=1).cpu().numpy()
            for x in embed.normalized(run.inputs("train")[rows], run.preprocessing)
        ]
        right = float((np.concatenate(answers) == truth).sum())
        smoothed = (right + 1) / (len(rows) + 2)  # if all are right, the error is small, but not 0
        return right / len(rows), (smoothed * (1 - smoothed) / len(rows)) ** 0.5

    return accuracy


@with_recipe
def command(recipe: Recipe, run: RunFolder = RUN) -> None:
    """Train the dispatcher of a new run, or resume it."""
    with stage() as watch:
        train(begin(run, recipe, watch))


if __name__ == "__main__":
    start(command)
