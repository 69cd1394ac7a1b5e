"""The speed of training an adapter, against full fine-tuning of the same network on the same images.

    python -m benchmarks.training                                  # ResNet-50 at 224 px
    python -m benchmarks.training --backbone tf_efficientnet_lite0 --size 64 --batch 64
    python -m benchmarks.training --swav                           # the paper's objective and masks alone

Three ways, each in a separate process: *masking* and *fine-tuning* run in the loop of ``cascade train`` and differ only
in what is trained; *eager* is what a user would write with timm and PyTorch: the model as timm makes it, AdamW, and the
same augmentation and loss. The paper says that masking is not noticeably slower than fine-tuning: at most 1.1 times in
time and memory. With SwAV there is no eager way.
"""

import itertools
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import timm
import torch
import typer
from PIL import Image
from rich.progress import track
from torch.nn.functional import cross_entropy

from benchmarks.report import Rows, figure, report, single
from benchmarks.subprocesses import Work, peers, ratios, resident_bytes
from cascade.model import backbone as backbones
from cascade.model.preprocessing import Preprocessing
from training.cost import peak_bytes
from training.data.augment import shift_flip
from training.loop import fit, seed_everything
from training.masking import mask_backbone
from training.objectives import SHIFT, Objective, SelfSupervised, Supervised
from training.recipe import Recipe
from training.run import device
from training.tuned import tune_backbone

GOAL, CLASSES = "<= 1.1", 10
SHEET = Path(__file__).parents[1] / "tests" / "data" / "cifar10.png"


def build(way: str, recipe: Recipe) -> Work:
    """A way to train; its work is a number of steps and returns (seconds per step, peak growth in bytes)."""
    before = resident_bytes()
    pixels = images(recipe.size, 8 * recipe.batch)
    stamps = eager(recipe, pixels) if way == "eager" else looped(way, recipe, pixels)

    def work(steps: int) -> tuple[float, int]:
        taken = [b - a for a, b in itertools.pairwise(stamps(steps + 1))]
        if torch.cuda.is_available():
            return sum(taken) / steps, torch.cuda.max_memory_allocated()
        return sum(taken) / steps, peak_bytes() - before

    return work


def looped(way: str, recipe: Recipe, pixels: np.ndarray) -> Any:
    """Training in the loop of ``cascade train``: a function of the number of steps that gives the end of each."""
    backbone = backbones.load(recipe.backbone, recipe.source, device=device())
    preprocessing = Preprocessing.of(backbone.config, recipe.size)
    if way == "masking":
        adapt: Any = recipe.adapt
        model = mask_backbone(backbone, 0, train_norms=recipe.train_norms, amp=recipe.amp, adapt=adapt)
    else:
        model = tune_backbone(backbone, 0, train_norms=recipe.train_norms, amp=recipe.amp)

    def run(steps: int) -> list[float]:
        seed_everything(0)
        objective: Objective
        if recipe.labels:
            objective = Supervised(recipe, backbone.features, preprocessing, np.arange(len(pixels)) % CLASSES)
        else:
            objective = SelfSupervised(recipe, backbone.features, preprocessing)
        objective.module.to(device())
        stamps: list[float] = []
        with tempfile.TemporaryDirectory() as folder:
            watch = lambda *_: stamps.append(now())  # noqa: E731
            fit(way, model, objective, pixels, recipe, steps, Path(folder), every=10**9, watch=watch)
        return stamps

    return run


def eager(recipe: Recipe, pixels: np.ndarray) -> Any:
    """The same with timm's model and an ordinary loop."""
    model = timm.create_model(recipe.backbone, num_classes=CLASSES).to(device()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr)
    config: Any = model.pretrained_cfg
    generator = torch.Generator().manual_seed(0)

    def run(steps: int) -> list[float]:
        stamps = []
        for _ in range(steps):
            rows = torch.randint(len(pixels), (recipe.batch,), generator=generator)
            batch = torch.from_numpy(pixels[rows.numpy()]).to(device())
            x = shift_flip(batch, recipe.size // SHIFT, generator, config["mean"], config["std"])
            loss = cross_entropy(model(x), (rows % CLASSES).to(device()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            stamps.append(now())
        return stamps

    return run


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
    swav: Annotated[bool, typer.Option("--swav", help="Without labels, masks alone, BatchNorm in train mode.")] = False,
    local_crops: Annotated[int, typer.Option(help="With SwAV: beside the two global ones.")] = 0,
    optimizer: Literal["sgd", "adam"] = "adam",
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
        labels=not swav,
        objective="swav" if swav else "auto",
        local_crops=local_crops,
        optimizer=optimizer,
        lr=1e-3,
        head_steps=0,
        amp=amp,
        train_norms=swav,
    )
    ways = ("masking", "fine-tuning") if swav else ("masking", "fine-tuning", "eager")
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
        rows.add(f"{way}", figure([batch / taken for taken in seconds[way]]), "images/s")
    figures = {
        "train_step_over_finetune": figure(ratios(seconds["masking"], seconds["fine-tuning"]), GOAL),
        "memory_over_finetune": single(memory["masking"] / memory["fine-tuning"], GOAL),
    }
    if not swav:
        figures["images_per_s_over_eager"] = figure(ratios(seconds["eager"], seconds["masking"]), ">= 1.3")
        figures["finetune_images_per_s_over_eager"] = figure(ratios(seconds["eager"], seconds["fine-tuning"]), ">= 1.3")
    name = f"training-{backbone}{'-swav' if swav else ''}{'' if amp == 'off' else '-' + amp}"
    report(name, figures, rows.table, executor=None)


if __name__ == "__main__":
    typer.run(main)
