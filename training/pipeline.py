"""All stages in a row: images in, a bundle out. ``cascade train`` runs this.

    cascade train photos/ --labels --out model_store/photos/1     # class folders: a mask with a head
    cascade train photos/ --labels --size 64 --defer-to 128 --out model_store/photos/1     # unsure: asked again, larger
    cascade train photos/ --labels --size 64 --defer-to 128 --larger-mask --out model_store/photos/1     # each its mask
    cascade train photos/ --labels --clusters 5 --out model_store/photos/1     # experts with labels, if they pay
    cascade train photos/ --labels --frozen --out model_store/photos/1     # the head alone, in seconds
    cascade train photos/ --out model_store/photos/1     # no labels: distilled from a larger input size
    cascade train photos/ --objective distill --clusters 5 --out model_store/photos/1     # by experts, if they pay
    cascade train photos/ --objective swav --clusters 5 --out model_store/photos/1     # the paper's cascade
    cascade train photos/ --objective distill+swav --out model_store/photos/1     # distilled, then SwAV
    cascade train photos/ --clusters 5 --out model_store/photos/1 --ray     # experts in parallel
    cascade train --from-unknown unknown/ --out model_store/new/1     # images that a server kept, as they fit no bundle
    torchrun --nproc-per-node 4 -m -- training.pipeline photos/ --out model_store/photos/1     # several GPUs

If interrupted at any time, it resumes when started again with the same options.
"""

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from operator import mul
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

from cascade.errors import CascadeError
from cascade.model.masks import density
from training import (
    clusters,
    comparison,
    deferral,
    dispatcher,
    distillation,
    distilled_experts,
    distributed,
    evaluate,
    experts,
    export,
    labeled_experts,
    ray_experts,
    unknown,
)
from training.cli import stage, start, with_recipe
from training.cost import Cost
from training.deferral import Larger
from training.frozen import Candidate, check_labels, frozen_head
from training.loop import fit
from training.recipe import Recipe, paper
from training.run import Run, begin, read_json, write_json

TIMED_STEPS, LONG = 6, 100  # the time of longer trainings is measured and said first
NEED_LABELS = {"--extensible": "keeps statistics of each class", "--frozen": "fits a head to class folders"}
LOSE = 0.3  # points
AskAgain = Callable[[Candidate, Sequence[str]], Larger | None]
"""Fits the larger size for a classifier, given what it may run under."""
LEAST_PLANNED = 20  # fewest steps, however short the time is


def train(
    run: Run,
    out: Path,
    *,
    controls: bool = False,
    thumbnails: bool = False,
    extensible: bool = False,
    ray: bool = False,
    frozen: bool = False,
    compare: bool = False,
    minutes: float = 0.0,
    defer_to: int = 0,
    lose: float = LOSE,
    larger_mask: bool = False,
) -> Path:
    """Run all stages that the recipe needs, and return the bundle's folder.

    Args:
        controls: also train the controls of the paper.
        thumbnails: put small pictures of the neighbor bank's images into the bundle.
        extensible: with labels, keep what ``cascade heads add`` needs for new classes.
        ray: train each expert as a Ray task.
        frozen: with labels, only the head on the frozen backbone.
        compare: with labels, also train LoRA and fine-tune every weight, for the same steps.
        minutes: reduce the steps so that the training takes about this long; 0: all steps.
        defer_to: with labels, a larger input size for images about which the bundle is unsure; 0: none.
        lose: points of accuracy that this may lose against always asking the larger size.
        larger_mask: also train a mask for the larger size.

    Raises:
        CascadeError: ``out`` exists or can't be written, or Ray is not installed (checked before anything is
            trained), or a stage can't continue.
    """
    _check_out(out)
    options = {"--extensible": extensible, "--frozen": frozen, "--compare": compare, "--defer-to": bool(defer_to)}
    options |= {"--controls": controls, "--ray": ray, "--larger-mask": larger_mask}
    _check_options(run.recipe, {option for option, given in options.items() if given})
    if defer_to:
        deferral.preprocessing_of(run, defer_to)
    if ray:
        ray_experts.check()
    larger = deferral.at_size(run, defer_to) if larger_mask else None
    ask_again = partial(deferral.fit, run, size=defer_to, lose=lose, trained=larger) if defer_to else None
    if frozen:
        return _frozen(run, out, thumbnails, extensible, ask_again)
    others = [each for each in (larger, run.distilled) if each is not None]
    if minutes:
        fit_to([run, *others], minutes)
    total = budget(run, controls, others)
    if total >= LONG and not minutes and distributed.world() == 1 and not (run.folder / "dispatcher").exists():
        _tell_time(run, total, others)
    match run.recipe.kind, run.recipe.clusters > 0:
        case "labels", True:
            return _labeled_experts(run, out, thumbnails)
        case "labels", False:
            return _labeled(run, out, compare, thumbnails, extensible, ask_again, larger)
        case "distill", True:
            return _distilled_experts(run, out, thumbnails)
        case "distill", False:
            return _distilled(run, out, controls, thumbnails)
    return _cascade(run, out, controls, thumbnails, ray)


def _frozen(run: Run, out: Path, thumbnails: bool, extensible: bool, ask_again: AskAgain | None) -> Path:
    """Write a bundle of the frozen head alone."""
    check_labels(run)
    head = frozen_head(run)
    run.watch.say(f"head on the frozen backbone: {100 * head.test:.1f} % of {len(run.held_out)} held-out images")
    facts = {"serves": "frozen", "accuracy": round(head.test, 4), "calibration_error": round(head.calibration_error, 4)}
    larger = ask_again(head, ["frozen"]) if ask_again else None
    return export.export_classifier(run, head, facts, out, thumbnails=thumbnails, extensible=extensible, larger=larger)


def _labeled(
    run: Run,
    out: Path,
    compare: bool,
    thumbnails: bool,
    extensible: bool,
    ask_again: AskAgain | None,
    larger: Run | None,
) -> Path:
    """Train frozen head and mask, also a mask for a larger size, and write the better one as a bundle."""
    check_labels(run)
    head = frozen_head(run)
    run.watch.say(f"head on the frozen backbone: {100 * head.validation:.1f} % of the validation images")
    dispatcher.train(run)
    if larger is not None:
        dispatcher.train(larger)
    if distributed.rank():
        return out
    chosen, facts = comparison.compare(run, others=compare)
    run.watch.show(comparison.show(facts))
    run.watch.say(comparison.verdict(facts))
    asked = ask_again(chosen, ["frozen", "dispatcher"]) if ask_again else None
    options: dict[str, Any] = {"thumbnails": thumbnails, "extensible": extensible, "larger": asked}
    return export.export_classifier(run, chosen, facts, out, **options)


def _labeled_experts(run: Run, out: Path, thumbnails: bool) -> Path:
    """Train experts with labels and their control, and write the best of both and the frozen head as a bundle."""
    check_labels(run)
    labeled_experts.train(run)
    if distributed.rank():
        return out
    chosen, facts = labeled_experts.compare(run)
    run.watch.show(comparison.show(facts))
    run.watch.say(labeled_experts.verdict(facts))
    if chosen.name == labeled_experts.EXPERTS:
        return export.export(run, evaluate.collect(run), facts, out, thumbnails=thumbnails)
    return export.export_classifier(run, chosen, facts, out, thumbnails=thumbnails)


def _distilled(run: Run, out: Path, controls: bool, thumbnails: bool) -> Path:
    """Distill one mask from a teacher, measure its gain over the frozen backbone, and write the bundle."""
    begin = time.perf_counter()
    dispatcher.train(run)
    seconds = time.perf_counter() - begin
    if controls:
        dispatcher.controls(run)
    with distributed.first():
        clusters.fit(run)
    if distributed.rank():
        return out
    features = evaluate.collect(run)
    accuracy = evaluate.evaluate(run, features) | {"distillation": distillation.measure(run)}
    if "whitened" in accuracy:
        run.watch.show(evaluate.table(accuracy))
        run.watch.say(evaluate.footnote(accuracy))
    run.watch.say(distillation.verdict(run, accuracy["distillation"], seconds))
    return export.export(run, features, accuracy, out, thumbnails=thumbnails)


def _distilled_experts(run: Run, out: Path, thumbnails: bool) -> Path:
    """Distill experts and one mask from a teacher, and write the bundle of whatever comes closer to it."""
    joint = distilled_experts.train(run)
    if distributed.rank():
        return out
    features = evaluate.collect(run)
    facts = distilled_experts.compare(run, joint, features)
    run.watch.say(distilled_experts.verdict(facts))
    if facts["serves"] == distilled_experts.JOINT:
        return _distilled(joint, out, False, thumbnails)
    return export.export(
        run, features, evaluate.evaluate(run, features) | {"experts": facts}, out, thumbnails=thumbnails
    )


def _cascade(run: Run, out: Path, controls: bool, thumbnails: bool, ray: bool) -> Path:
    """Train dispatcher, clusters and experts, evaluate, and write the bundle (the paper)."""
    dispatcher.train(run)
    if run.steps and density(run.backbone, run.dispatcher) == 1 and not distributed.rank():
        run.watch.warn(
            "the dispatcher has switched no weight off, so it is the frozen backbone: train with more --steps or a"
            " higher --lr"
        )
    if controls:
        dispatcher.controls(run)
    with distributed.first():
        clusters.fit(run)
    (ray_experts if ray else experts).train(run)
    if distributed.rank():
        return out
    features = evaluate.collect(run)
    accuracy = evaluate.evaluate(run, features)
    if "whitened" in accuracy:
        run.watch.show(evaluate.table(accuracy))
        run.watch.say(evaluate.footnote(accuracy))
    run.watch.say(evaluate.verdict(accuracy, run.recipe.mode if run.recipe.clusters else "dispatcher"))
    return export.export(run, features, accuracy, out, thumbnails=thumbnails)


def budget(run: Run, controls: bool, others: Sequence[Run] = ()) -> int:
    """Print what will be trained, and on what; impossible settings fail here. Returns the number of all steps.

    Args:
        others: runs beside this one that are trained with it.
    """
    r = run.recipe
    name = "mask" if not r.clusters else "dispatcher" if r.kind == "swav" else "one mask"
    parts = {name: run.steps, f"{r.clusters} experts": run.expert_steps * r.clusters if r.clusters else 0}
    if controls:
        parts["equal-steps control"] = run.steps + r.clusters * r.expert_steps
    parts |= {name + other.suffix: other.steps for other in others}
    listed = ", ".join(f"{name} {steps}" for name, steps in parts.items() if steps)
    run.watch.say(f"{len(run.images)} images to train on, {len(run.held_out)} to measure by")
    _check_sides(run)
    stages = [run.backbone.stages[first].name for first in (run.mask_from, run.expert_from)]
    run.watch.say(
        f"{comparison.TITLES[r.adapt]} from {stages[0]} on" + (f", experts from {stages[1]} on" if r.clusters else "")
    )
    total = sum(parts.values())
    run.watch.say(f"{total} steps of {r.batch} images: {listed}")
    return total


def _tell_time(run: Run, total: int, others: Sequence[Run]) -> None:
    """Print how long ``total`` steps of the run and of ``others`` beside it will take."""
    steps = [total - sum(other.steps for other in others), *(other.steps for other in others)]
    seconds = [_seconds_per_step(each) for each in (run, *others)]
    minutes = sum(map(mul, steps, seconds)) / 60
    run.watch.say(f"about {minutes:.1f} min, at {' and '.join(f'{each:.2g}' for each in seconds)} s a step")


def fit_to(runs: Sequence[Run], minutes: float) -> None:
    """Reduce the steps of all runs by one share to fit into ``minutes``, by timing a few; stored for a resumed run."""
    paths = [run.folder / "plan.json" for run in runs]
    if not all(path.exists() for path in paths):
        seconds = [_seconds_per_step(run) for run in runs]
        share = 60 * minutes / max(1e-9, sum(run.steps * each for run, each in zip(runs, seconds, strict=True)))
        for run, path, each in zip(runs, paths, seconds, strict=True):
            steps = min(run.steps, max(LEAST_PLANNED, int(share * run.steps)))
            write_json(path, {"minutes": minutes, "steps": steps, "seconds_per_step": round(each, 3)})
    for run, path in zip(runs, paths, strict=True):
        run.planned = (plan := read_json(path))["steps"]
        run.watch.say(
            f"{plan['steps']} steps{run.suffix and f' of {run.suffix[1:]}'} fit into {plan['minutes']:g} minutes"
            f" at {plan['seconds_per_step']:g} s a step"
        )


def _seconds_per_step(run: Run) -> float:
    """Seconds per step, measured on a throwaway model."""
    model = run.masked(run.mask_from)
    loss = dispatcher.objective(run)
    short = replace(run.recipe, head_steps=0)
    with tempfile.TemporaryDirectory() as folder:
        stamps: list[float] = []
        watch = lambda *_: stamps.append(time.perf_counter())  # noqa: E731
        fit("timing", model, loss, run.pixels, short, TIMED_STEPS, Path(folder), every=10**9, watch=watch)
    return (stamps[-1] - stamps[0]) / (len(stamps) - 1)


def _check_options(recipe: Recipe, given: set[str]) -> None:
    """Check that the given options suit the kind of training, before anything is trained."""
    for option, why in NEED_LABELS.items():
        if option in given and not recipe.labels:
            raise CascadeError(f"{option} {why}: add --labels")
    if "--larger-mask" in given and ("--defer-to" not in given or "--frozen" in given):
        raise CascadeError("--larger-mask trains a mask for the size of --defer-to: give that, and omit --frozen")
    if recipe.kind == "swav" or not recipe.clusters or "--frozen" in given:
        return
    unfit = {"--ray", "--extensible", "--compare", "--defer-to"} if recipe.labels else {"--ray", "--controls"}
    if wrong := sorted(unfit & given):
        raise CascadeError(f"--clusters trains experts and their control: omit {' and '.join(wrong)}")


def _check_out(out: Path) -> None:
    """Check that the bundle can be written, before anything is trained."""
    if out.exists():
        raise CascadeError(f"{out} exists and versions are never overwritten: choose a new version")
    there = next(folder for folder in out.absolute().parents if folder.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise CascadeError(f"{out} can't be written, {there} does not let you: choose another --out")


def _check_sides(run: Run) -> None:
    """Check that the backbone accepts the sizes of all crops: most ViTs accept only one."""
    r, main = run.recipe, run.preprocessing.size
    for side in {main, *(side for _, side, _ in r.crops(main))} if r.kind == "swav" else {main}:
        try:
            run.executor.run(torch.zeros(1, 3, side, side, device=run.backbone.weights.device))
        except (AssertionError, RuntimeError) as error:
            raise CascadeError(
                f"{r.backbone} can't take images of {side} px ({str(error).splitlines()[0]}):"
                " try another --size, or --local-crops 0"
            ) from error


def default_run(out: Path) -> Path:
    """The folder of the run for a bundle ``<name>/<version>``: runs/<name>-<version>."""
    return Path("runs") / f"{out.parent.name or 'bundle'}-{out.name}"


def _preset(context: typer.Context, name: str | None) -> None:
    """Start from the published setting; explicit options override it."""
    if name == "paper":
        context.default_map = {field: value for field, value in asdict(paper("")).items() if field != "data"}


@with_recipe
def command(
    recipe: Recipe,
    out: Annotated[Path, typer.Option(help="Bundle to write: <store>/<name>/<version>.")],
    run: Annotated[Path | None, typer.Option(help="Folder of the run; runs/<name>-<version> by default.")] = None,
    from_unknown: Annotated[
        Path | None,
        typer.Option(help="Instead of DATA: the folder of cascade serve --keep-unknown."),
    ] = None,
    preset: Annotated[
        Literal["paper"] | None,
        typer.Option(help="Start from the published setting.", is_eager=True, callback=_preset),
    ] = None,
    controls: Annotated[bool, typer.Option("--controls", help="Train and evaluate the controls, too.")] = False,
    thumbnails: Annotated[bool, typer.Option("--thumbnails", help=export.THUMBNAILS)] = False,
    extensible: Annotated[bool, typer.Option("--extensible", help=export.EXTENSIBLE)] = False,
    ray: Annotated[bool, typer.Option("--ray", help=ray_experts.HELP)] = False,
    frozen: Annotated[
        bool, typer.Option("--frozen", help="With --labels: only a head on the frozen backbone.")
    ] = False,
    compare: Annotated[bool, typer.Option("--compare", help="With --labels: also LoRA and full fine-tuning.")] = False,
    minutes: Annotated[float, typer.Option(help="Cut the steps to fit into this time; 0: all.")] = 0.0,
    defer_to: Annotated[
        int, typer.Option(help="With --labels: input size at which unsure images are asked again, pixels; 0: none.")
    ] = 0,
    lose: Annotated[
        float, typer.Option(help="--defer-to: points of accuracy to lose against always asking the larger size.", min=0)
    ] = LOSE,
    larger_mask: Annotated[
        bool, typer.Option("--larger-mask", help="--defer-to: also train a mask at the larger size.")
    ] = False,
    price_per_hour: Annotated[
        float,
        typer.Option(help="Price of one GPU, or of a machine without one; the cost of the run is shown at the end."),
    ] = 0.0,
) -> None:
    """Train a cascade."""
    folder = run or default_run(out)
    if bool(recipe.data) == (from_unknown is not None):
        raise CascadeError("name the folder of images, or --from-unknown FOLDER, and not both")
    with stage() as watch:
        with Cost(price_per_hour) as cost:
            if from_unknown is not None:
                _check_out(out)
                recipe = unknown.recipe_of(recipe, from_unknown, out, folder, watch)
            path = train(
                begin(folder, recipe, watch),
                out,
                controls=controls,
                thumbnails=thumbnails,
                extensible=extensible,
                ray=ray,
                frozen=frozen,
                compare=compare,
                minutes=minutes,
                defer_to=defer_to,
                lose=lose,
                larger_mask=larger_mask,
            )
        if not distributed.rank():
            watch.say(f"wrote {path}")
            if not ray:  # the cost of Ray's tasks is not measured here
                watch.say(cost.line())


if __name__ == "__main__":
    start(command)
