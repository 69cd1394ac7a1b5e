"""Stage 1: one mask for the whole unlabeled set (paper §3.3), and its controls.

python -m training.dispatcher cifar10 --run runs/cifar --mask-from blocks.6 --size 64 --steps 600
"""

from pathlib import Path

import numpy as np

from cascade.bundle.format import strip_prefix
from cascade.errors import CascadeError
from training.cli import Watch, main, parser, recipe_of
from training.loop import fit, seed_everything
from training.masking import MaskedModel
from training.objectives import Objective, SelfSupervised, Supervised
from training.run import Run, begin, device, trained

ZERO_STEPS = 20  # with BatchNorm in eval mode nothing but the scores could move, so these show as much as all


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
    """Train the dispatcher's mask, or one like it under another name.

    Args:
        model: what learns, the backbone under a mask by default.
        rows: the images to train on, all by default.
        head: folder of a training that is done, whose head this one begins with.
    """
    recipe = run.recipe
    steps = recipe.steps if steps is None else steps
    model = model or run.masked(run.mask_from)
    loss = objective(run, head)
    fit(name, model, loss, run.pixels, recipe, steps, run.folder / name, lr=lr, rows=rows, watch=run.watch)


def controls(run: Run) -> None:
    """The dispatcher trained for the whole cascade's steps, and at learning rate zero."""
    recipe = run.recipe
    train(run, "equal-steps", steps=recipe.steps + recipe.clusters * recipe.expert_steps)
    zero_rate(run)


def zero_rate(run: Run) -> None:
    """The control of learning rate zero: what BatchNorm's statistics alone bring."""
    train(run, "zero-rate", steps=run.recipe.steps if run.recipe.train_norms else ZERO_STEPS, lr=0.0)


def objective(run: Run, head: Path | None = None) -> Objective:
    """A loss, SwAV, or cross-entropy where the recipe says labels: fresh, or as a training in ``head`` has left it."""
    seed_everything(run.recipe.seed)
    if not run.recipe.labels:
        made: Objective = SelfSupervised(run.recipe, run.backbone.features, run.preprocessing, run.views)
    else:
        if run.images.labels is None:
            raise CascadeError(f"{run.recipe.data} has no class folders: leave --labels out")
        labels = run.images.labels.astype(np.int64)
        made = Supervised(run.recipe, run.backbone.features, run.preprocessing, labels)
    if head:
        made.module.load_state_dict(strip_prefix(trained(head), "objective."))
    made.module.to(device())
    return made


if __name__ == "__main__":
    options = parser(__doc__, recipe=True).parse_args()

    def stage(watch: Watch) -> None:
        train(begin(options.run, recipe_of(options), watch))

    main(stage)
