"""Full fine-tuning as a baseline for masks: the same loop and losses, but every weight and affine is trained.

python -m training.finetune photos/ --run runs/photos --labels --lr 0.01 --optimizer sgd --weight-decay 1e-6
"""

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cascade.bundle.format import strip_prefix
from cascade.model.backbone import Backbone
from cascade.model.stages import stage_of, stages
from training import dispatcher
from training.cli import RUN, RunFolder, stage, start, with_recipe
from training.masking import Amp, MaskedModel, write
from training.recipe import Recipe
from training.run import Run, begin

LR = 0.001


class TunedModel(MaskedModel):
    """A copy of a backbone in which all parameters from stage ``start`` on are trained."""

    @property
    def groups(self) -> dict[str, dict[str, nn.Parameter]]:
        return {"weights": {n: p for n, p in self.model.named_parameters() if p.requires_grad}}

    def active(self) -> float:
        return 1.0

    def sparse(self, below: float) -> Iterator[tuple[str, float]]:
        return iter(())


def tune_backbone(backbone: Backbone, start: int, *, train_norms: bool = True, amp: Amp = "off") -> TunedModel:
    """Make a trainable copy of ``backbone``; stages before ``start`` stay frozen."""
    model = deepcopy(backbone.model)
    write(backbone, model, backbone.weights, 0, backbone.norms)
    model.to(memory_format=torch.channels_last)  # twice as fast on a CPU
    row = stages(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(stage_of(name, row) >= start)
    return TunedModel(backbone, model, row, start, train_norms, len(row), amp)


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
