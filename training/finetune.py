"""Full fine-tuning as a baseline for masks: the same loop and losses, but every weight and affine is trained.

python -m training.finetune photos/ --run runs/photos --labels --lr 0.01 --optimizer sgd --weight-decay 1e-6
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cascade.bundle.format import strip_prefix
from training import dispatcher
from training.cli import RUN, RunFolder, stage, start, with_recipe
from training.masking import MaskedModel
from training.optimizers import WEIGHTS_LR
from training.recipe import Recipe
from training.run import Run, begin
from training.tuned import TunedModel, tune_backbone

LR = WEIGHTS_LR["labels"]


def train(
    run: Run,
    name: str = "fine-tuned",
    *,
    steps: int | None = None,
    lr: float | None = None,
    rows: np.ndarray | None = None,
    head: Path | None = None,
) -> TunedModel:
    """Fine-tune like ``dispatcher.train``, and return the model after the last step.

    Args:
        lr: overrides the recipe's; 0.001 if there is none.
    """
    recipe = run.recipe
    lr = recipe.lr or LR if lr is None else lr
    model = tune_backbone(run.backbone, run.mask_from, train_norms=recipe.train_norms, amp=recipe.amp)
    dispatcher.train(run, name, model=model, steps=steps, lr=lr, rows=rows, head=head)
    return model


@torch.no_grad()
def features(model: MaskedModel, inputs: Iterator[Tensor]) -> np.ndarray:
    """Features of evaluation inputs under a model during or after training: float32 [N, F]."""
    model.model.eval()
    device = model.backbone.weights.device
    return np.concatenate([model.tail(model.trunk(x.to(device))).cpu().numpy() for x in inputs])


def logits(run: Run, name: str, found: np.ndarray) -> np.ndarray:
    """The supervised head of a run's finished training on features [N, F]: float32 [N, C]."""
    head = strip_prefix(run.trained(name), "objective.")
    return found @ head["weight"].numpy().T + head["bias"].numpy()


@with_recipe
def command(recipe: Recipe, run: RunFolder = RUN) -> None:
    """Fine-tune in a new run, or resume it."""
    with stage() as watch:
        train(begin(run, recipe, watch))


if __name__ == "__main__":
    start(command)
