"""All stages in a row: images in, a bundle out. What "cascade train" runs.

    cascade train photos/ --out model_store/photos/1
    cascade train cifar10 --size 64 --mask-from blocks.6 --out model_store/cifar/1 --controls
    cascade train photos/ --labels --out model_store/photos/1     # one mask with a head, from class folders
    cascade train photos/ --clusters 0 --out model_store/photos/1     # one self-supervised mask, no router
    cascade train photos/ --out model_store/photos/1 --ray     # experts beside each other, see training.ray_experts
    torchrun --nproc-per-node 4 -m -- training.pipeline photos/ --out model_store/photos/1     # several GPUs

Stopped at any moment and started again with the same options it goes on where it was.
"""

import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from cascade.errors import CascadeError
from cascade.model.masks import density
from training import clusters, dispatcher, distributed, evaluate, experts, export, ray_experts
from training.cli import Watch, main, parser, recipe_of
from training.cost import Cost
from training.recipe import paper
from training.run import Run, begin


def train(run: Run, out: Path, *, controls: bool = False, thumbnails: bool = False, ray: bool = False) -> Path:
    """Dispatcher, clusters, experts, evaluation, bundle (with pictures of its neighbor bank's images on wish).

    Args:
        ray: each expert as a Ray task.

    Raises:
        CascadeError: ``out`` exists or can't be written, or there is no Ray (found before anything is trained), or a
            stage can't go on.
    """
    if out.exists():
        raise CascadeError(f"{out} exists; versions are never overwritten: choose the next number")
    there = next(folder for folder in out.absolute().parents if folder.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise CascadeError(f"{out} can't be written, {there} does not let you: choose another --out")
    if ray:
        ray_experts.check()
    budget(run, controls)
    dispatcher.train(run)
    if run.recipe.steps and density(run.backbone, run.dispatcher) == 1 and not distributed.rank():
        run.watch.say(
            "[yellow]warning:[/] the dispatcher has switched no weight off, so it is the frozen backbone: train with"
            " more --steps or a higher --lr"
        )
    if controls:
        dispatcher.controls(run)
    with distributed.first():
        clusters.train(run)
    (ray_experts if ray else experts).train(run)
    if distributed.rank():
        return out
    features = evaluate.collect(run)
    accuracy = evaluate.train(run, features)
    if run.watch.bar is not None:
        evaluate.show(accuracy, Console())
    run.watch.say(evaluate.verdict(accuracy, run.recipe.mode if run.recipe.clusters else "dispatcher"))
    return export.train(run, features, accuracy, out, thumbnails=thumbnails)


def budget(run: Run, controls: bool) -> None:
    """Say what will be trained, on what and for how long; what can't work stops here, before the first step."""
    r = run.recipe
    parts = {"dispatcher": r.steps, f"{r.clusters} experts": r.clusters * r.expert_steps}
    if controls:
        parts["equal-steps control"] = r.steps + r.clusters * r.expert_steps
    listed = ", ".join(f"{name} {steps}" for name, steps in parts.items() if steps)
    run.watch.say(f"{len(run.images)} images to train on, {len(run.held_out)} to measure by")
    _check_sides(run)
    stages = [run.backbone.stages[first].name for first in (run.mask_from, run.expert_from)]
    run.watch.say(f"dispatcher masked from {stages[0]} on" + (f", experts from {stages[1]} on" if r.clusters else ""))
    run.watch.say(f"{sum(parts.values())} steps of {r.batch} images: {listed}")


def _check_sides(run: Run) -> None:
    """That the backbone takes images of the sides of all crops: most ViTs are made for one."""
    r, main = run.recipe, run.preprocessing.size
    for side in {main} if r.labels else {main, *(side for _, side, _ in r.crops(main))}:
        try:
            run.executor.run(torch.zeros(1, 3, side, side, device=run.backbone.weights.device))
        except (AssertionError, RuntimeError) as error:
            raise CascadeError(
                f"{r.backbone} can't take images of {side} px ({str(error).splitlines()[0]}):"
                " try another --size, or --local-crops 0"
            ) from error


def command(arguments: list[str]) -> None:
    """``cascade train``."""
    options = parser(__doc__, recipe=True)
    options.usage = "cascade train DATA --out BUNDLE [options]"
    options.add_argument("--out", type=Path, required=True, help="bundle to write: <store>/<name>/<version>")
    options.add_argument("--controls", action="store_true", help="train and evaluate the controls, too")
    options.add_argument("--thumbnails", action="store_true", help=export.THUMBNAILS)
    options.add_argument("--ray", action="store_true", help=ray_experts.HELP)
    options.add_argument("--preset", choices=["paper"], help="start from the published setting")
    options.add_argument(
        "--price-per-hour", type=float, default=0.0, help="of one GPU, or of this machine without: its cost is told"
    )
    chosen = options.parse_args(arguments)
    if chosen.preset:
        options.set_defaults(**asdict(paper(chosen.data)))
        chosen = options.parse_args(arguments)  # what was said beside the preset still counts

    def stage(watch: Watch) -> None:
        with Cost(chosen.price_per_hour) as cost:
            run = begin(chosen.run, recipe_of(chosen), watch)
            path = train(run, chosen.out, controls=chosen.controls, thumbnails=chosen.thumbnails, ray=chosen.ray)
        if not distributed.rank():
            watch.say(f"wrote {path}")
            if not chosen.ray:  # what its tasks use, elsewhere, is not seen
                watch.say(cost.line())

    main(stage)


if __name__ == "__main__":
    command(sys.argv[1:])
