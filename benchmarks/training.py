"""The cost of a masking step, against a step of full fine-tuning of the same network on the same images.

    python -m benchmarks.training                                  # ResNet-50 at 224 px
    python -m benchmarks.training --backbone tf_efficientnet_lite0 --size 128 --batch 32

The paper says that masking is not noticeably slower: at most 1.1 times in time and memory. Both train the whole network
with the same loss, optimizer, crops and loop (``training.loop.fit``), each in a separate process.
"""

import itertools
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from PIL import Image
from rich.progress import track

from benchmarks.report import Rows, figure, report, single
from benchmarks.subprocesses import Work, peers, ratios, resident_bytes
from cascade.model import backbone as backbones
from cascade.model.preprocessing import Preprocessing
from training.cost import peak_bytes
from training.finetune import tune_backbone
from training.loop import fit, seed_everything
from training.masking import mask_backbone
from training.objectives import SelfSupervised
from training.recipe import Recipe
from training.run import device

GOAL = "<= 1.1"
SHEET = Path(__file__).parents[1] / "tests" / "data" / "cifar10.png"


def build(way: str, recipe: Recipe) -> Work:
    """A way to train; its work is a number of steps and returns (seconds per step, peak growth in bytes)."""
    before = resident_bytes()
    backbone = backbones.load(recipe.backbone, recipe.source, device=device())
    preprocessing = Preprocessing.of(backbone.config, recipe.size)
    make: Any = {"masking": mask_backbone, "fine-tuning": tune_backbone}[way]
    model = make(backbone, 0, train_norms=recipe.train_norms, amp=recipe.amp)
    del make
    pixels = images(recipe.size, 8 * recipe.batch)

    def work(steps: int) -> tuple[float, int]:
        seed_everything(0)
        objective = SelfSupervised(recipe, backbone.features, preprocessing)
        objective.module.to(device())
        stamps: list[float] = []
        with tempfile.TemporaryDirectory() as folder:
            watch = lambda *_: stamps.append(now())  # noqa: E731
            fit(way, model, objective, pixels, recipe, steps + 1, Path(folder), every=10**9, watch=watch)
        taken = [b - a for a, b in itertools.pairwise(stamps)]
        if torch.cuda.is_available():
            return sum(taken) / steps, torch.cuda.max_memory_allocated()
        return sum(taken) / steps, peak_bytes() - before

    return work


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def images(size: int, count: int) -> np.ndarray:
    """Real images, enlarged: uint8 [count, 3, size, size]."""
    sheet = Image.open(SHEET).convert("RGB")
    side = sheet.width // 20
    boxes = ((x * side, y * side, (x + 1) * side, (y + 1) * side) for y in range(15) for x in range(20))
    some = itertools.islice(itertools.cycle(boxes), count)
    return np.stack([np.asarray(sheet.crop(box).resize((size, size))).transpose(2, 0, 1) for box in some])


def main(
    backbone: Annotated[str, typer.Option(help="timm's name; its weights are random.")] = "resnet50",
    size: Annotated[int, typer.Option(help="Side of the images, pixels.")] = 224,
    batch: Annotated[int, typer.Option(help="Images a step.")] = 16,
    local_crops: Annotated[int, typer.Option(help="Beside the two global ones.")] = 0,
    optimizer: Literal["sgd", "adam"] = "sgd",
    amp: Literal["off", "bf16", "fp16"] = "off",
    rounds: int = 5,
    steps: Annotated[int, typer.Option(help="Of each way in a round.")] = 2,
) -> None:
    """Time a step of masking against one of fine-tuning."""
    recipe = Recipe(
        "",
        backbone=backbone,
        source="random:0",
        size=size,
        batch=batch,
        local_crops=local_crops,
        optimizer=optimizer,
        lr=1e-3,
        amp=amp,
        train_norms=True,
    )
    ways = ("masking", "fine-tuning")
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    memory = dict.fromkeys(ways, 0)
    with peers({way: (build, way, recipe) for way in ways}) as running:
        for nth in track(range(rounds + 1), "rounds"):
            for way in ways if nth % 2 else ways[::-1]:
                _, (taken, memory[way]) = running[way].time(steps)
                if nth:  # the first one is not counted
                    seconds[way].append(taken)
    rows = Rows(f"{backbone} at {size} px, {batch} images a step, {optimizer}")
    for way in ways:
        rows.add(f"a step of {way}", figure(seconds[way]), "s", memory[way])
    figures = {
        "step_over_fine_tuning": figure(ratios(seconds["masking"], seconds["fine-tuning"]), GOAL),
        "memory_over_fine_tuning": single(memory["masking"] / memory["fine-tuning"], GOAL),
    }
    report(
        f"training-{backbone}{'' if amp == 'off' else '-' + amp}",
        figures,
        rows.table,
        executor=None,
    )


if __name__ == "__main__":
    typer.run(main)
