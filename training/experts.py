"""Stage 3: one expert a cluster, each started from the dispatcher (paper §3.3).

python -m training.experts --run runs/cifar
"""

import numpy as np
import torch

from training.dispatcher import objective
from training.loop import fit, seed_everything, under
from training.masking import mask_backbone
from training.run import Run, Watch, main, parser, resume


def train(run: Run) -> None:
    """Train every expert on the images that the router sends to it."""
    if not run.recipe.clusters:
        return
    assigned = run.clusters["assigned"].numpy()
    for k in range(run.recipe.clusters):
        train_one(run, k, np.flatnonzero(assigned == k))


def train_one(run: Run, k: int, rows: np.ndarray) -> None:
    """Train expert ``k`` on the images ``rows``; scores, statistics, head and prototypes start as the dispatcher's."""
    recipe, name = run.recipe, f"expert-{k}"
    model = mask_backbone(
        run.backbone,
        run.expert_from,
        initial=recipe.initial,
        threshold=recipe.threshold,
        train_norms=recipe.train_norms,
        below=run.dispatcher,
    )
    dispatcher = run.trained("dispatcher")
    model.load(under(dispatcher, "scores."), under(dispatcher, "norms."))
    seed_everything(recipe.seed)
    loss = objective(run)
    loss.module.load_state_dict(under(dispatcher, "objective."))
    with torch.no_grad():  # the queue holds the dispatcher's features of other images
        for buffer in loss.module.buffers():
            buffer.zero_()
    fit(
        name,
        model,
        loss,
        run.pixels,
        recipe,
        recipe.expert_steps,
        run.folder / name,
        rows=rows,
        watch=run.watch,
    )


if __name__ == "__main__":
    options = parser(__doc__).parse_args()

    def stage(watch: Watch) -> None:
        train(resume(options.run, watch))

    main(stage)
