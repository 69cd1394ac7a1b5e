"""Throughput when 20 models of each kind are served mixed: a column in the table of ``benchmarks.accuracy``.

    python -m benchmarks.accuracy_throughput
    python -m benchmarks.accuracy_throughput --backbone mobilenetv2_100

Batches of 32 images of 64 px, each for one of 20 models drawn uniformly, go through the engine; fine-tuned copies are
20 resident ONNX Runtime sessions. Values are random, with a seed: time does not depend on them. Each kind is a separate
process, and rounds are interleaved.
"""

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks import synthetic
from benchmarks.accuracy import BACKBONES, SIZE
from benchmarks.accuracy_figures import mixed_name
from benchmarks.report import Rows, figure, report
from benchmarks.serving.baselines import Answer, grouped, static_session
from benchmarks.serving.mixed import BATCH, HELD, uniform
from benchmarks.subprocesses import peers, rounds
from cascade.model import masks
from cascade.model.backbone import Backbone
from cascade.model.masks import Mask

KINDS = ("frozen", "channels", "mask", "both", "delta", "full")
MODELS = 20


def adapted(backbone: Backbone, kind: str, seed: int) -> Mask:
    """An adapter as the row ``kind`` of ``benchmarks.accuracy`` ships it, with random values."""
    draw, weights = np.random.default_rng(seed), backbone.weights.numel()
    channels: dict[str, torch.Tensor] = {}
    deltas: dict[str, torch.Tensor] = {}
    if kind == "frozen":
        return masks.frozen(backbone)
    bits = masks.all_ones(weights)
    if kind in ("mask", "both"):
        bits = synthetic.mask(backbone, "", 0, seed).bits
    if kind != "mask":
        channels = {
            n: torch.from_numpy(draw.uniform(0.9, 1.1, shape)).half() for n, shape in backbone.channels().items()
        }
    if kind == "delta":
        bits = torch.from_numpy(np.frombuffer(draw.bytes(len(bits)), np.uint8).copy())
        deltas = {n: torch.from_numpy(draw.uniform(0, 0.01, rows)).half() for n, rows in backbone.rows().items()}
    return Mask("dispatcher", 0, bits, {}, channels, deltas)


def served(name: str, kind: str) -> Answer:
    """20 models of a kind, which answer batches of their numbers."""
    backbone = synthetic.load(name)
    pixels = synthetic.noise(backbone, 64)[..., :SIZE, :SIZE].contiguous()
    if kind == "full":
        sessions = [static_session(backbone, synthetic.mask(backbone, "", 0, i), pixels) for i in range(MODELS)]

        def run(model: int, x: torch.Tensor) -> Any:
            return sessions[model].run(None, {"x": x.numpy()})[0]

        return grouped(run, pixels)
    bundles = [synthetic.bundle_of(backbone, str(i), [adapted(backbone, kind, i)], size=SIZE) for i in range(MODELS)]
    engine = synthetic.engine_of(bundles, HELD * synthetic.mask_bytes(backbone))

    def answer(batch: list[int]) -> object:
        return engine.run([synthetic.item(engine, str(model), pixels[i % 64]) for i, model in enumerate(batch)])

    return answer


def main(
    backbone: Annotated[str, typer.Option(help=f"One of {', '.join(BACKBONES)}.")] = [*BACKBONES][0],
    count: Annotated[int, typer.Option("--rounds")] = 15,
    out: Annotated[Path | None, typer.Option(help="File of the JSON.")] = None,
) -> None:
    """Measure images per second of each kind."""
    with peers({kind: (served, backbone, kind) for kind in KINDS}) as running:
        seconds = rounds(running, uniform(MODELS, count), warm=2)
    rows = Rows(f"{MODELS} models served mixed: {backbone}")
    rates = {kind: figure([BATCH / taken for taken in own]) for kind, own in seconds.items()}
    for kind, rate in rates.items():
        rows.add(kind, rate, "images/s")
    report(mixed_name(backbone), rates, rows.table, executor=synthetic.executor_name(backbone), out=out)


if __name__ == "__main__":
    typer.run(main)
