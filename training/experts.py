"""Stage 3: one expert per cluster, each started from the dispatcher (paper §3.3).

    python -m training.experts --run runs/cifar
    python -m training.experts --run runs/cifar --only 0 --only 3     # these, and the others elsewhere

Experts are independent: any process with access to the run's folder may train some of them, and each expert has its own
folder there. The next stage needs them all. ``training.ray_experts`` trains them in parallel.
"""

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
import typer

from cascade.errors import CascadeError
from training.cli import RUN, RunFolder, stage, start
from training.dispatcher import objective
from training.loop import fit
from training.run import Run, resume


def train(run: Run, only: Sequence[int] = ()) -> None:
    """Train every expert, or ``only`` some, on the images that the router assigns to it."""
    if unknown := [k for k in only if not 0 <= k < run.recipe.clusters]:
        raise CascadeError(f"there is no expert {unknown[0]}: the run has {run.recipe.clusters} clusters, from 0 on")
    if not run.recipe.clusters:
        return
    assigned = run.clusters["assigned"].numpy()
    for k in only or range(run.recipe.clusters):
        train_one(run, k, np.intersect1d(np.flatnonzero(assigned == k), run.rows[0]))


def train_one(run: Run, k: int, rows: np.ndarray) -> None:
    """Train expert ``k`` on the images ``rows``, from the dispatcher's scores, statistics, head and prototypes."""
    recipe, name = run.recipe, f"expert-{k}"
    model = run.masked(run.expert_from, below=run.dispatcher)
    dispatcher = run.trained("dispatcher")
    model.load_state(dispatcher)
    loss = objective(run, run.folder / "dispatcher")
    with torch.no_grad():  # the queue contains the dispatcher's features of other images
        for buffer in loss.module.buffers():
            buffer.zero_()
    fit(
        name,
        model,
        loss,
        run.pixels,
        recipe,
        run.expert_steps,
        run.folder / name,
        rows=rows,
        watch=run.watch,
    )


def command(
    run: RunFolder = RUN,
    only: Annotated[list[int] | None, typer.Option(metavar="K", help="Number of an expert; may be repeated.")] = None,
) -> None:
    """Train the experts of a run whose clusters are fitted."""
    with stage() as watch:
        train(resume(run, watch), only or ())


if __name__ == "__main__":
    start(command)
