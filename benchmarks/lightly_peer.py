"""A peer of training without labels: lightly-train on the same backbone, for as many images seen.

    python -m venv /tmp/lightly
    /tmp/lightly/bin/pip install 'lightly-train[timm]==0.18.0' safetensors
    python -m benchmarks.lightly_peer cifar10 --python /tmp/lightly/bin/python

lightly-train (AGPL) runs in an environment and a process of its own (``benchmarks.lightly_worker``). It starts from the
same ImageNet weights and trains all of them by SimCLR with AdamW. Its copy is scored like every row without labels of
``benchmarks.accuracy``, whose results it joins as the row ``unlabeled-lightly``. lightly-train recommends hundreds of
epochs and larger batches, so this is a weak peer: it shows what the same images give, not what SimCLR can do.
"""

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Annotated

import typer
from safetensors.torch import save_file

from benchmarks.accuracy import BACKBONES, Cell, scored
from benchmarks.accuracy_figures import RESULTS
from cascade.engine.executors.plain import PlainExecutor
from cascade.engine.weight_cache import WeightCache
from cascade.model import backbone as backbones
from training import embed
from training.cli import watching
from training.run import SPLITS, Run, begin, write_json

ROOT = Path(__file__).parents[1]
BATCH, RATE = 128, 1e-4
PRIVATE = {"LIGHTLY_TRAIN_EVENTS_DISABLED": "1", "NO_ALBUMENTATIONS_UPDATE": "1", "HF_HUB_OFFLINE": "1"}  # no telemetry


def train(run: Run, python: str, method: str) -> tuple[Path, int]:
    """Run lightly-train; returns its checkpoint, which is a state dict of timm, and the number of epochs."""
    folder = run.folder.absolute()
    pictures = folder / "images"
    pictures.mkdir(exist_ok=True)
    for i in range(len(run.images)):
        if not (path := pictures / f"{i:06d}.png").exists():
            run.images.open(i).save(path)
    save_file({n: t.contiguous() for n, t in run.backbone.model.state_dict().items()}, folder / "start.safetensors")
    epochs = max(1, round(run.steps * run.recipe.batch / len(run.images)))
    settings = {
        "folder": str(folder),
        "backbone": run.recipe.backbone,
        "method": method,
        "size": run.preprocessing.size,
        "mean": run.preprocessing.mean,
        "std": run.preprocessing.std,
        "epochs": epochs,
        "batch": min(BATCH, len(run.images)),
        "rate": RATE,
        "seed": run.recipe.seed,
    }
    environment = os.environ | PRIVATE | {"LIGHTLY_TRAIN_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    subprocess.run([python, "-m", "benchmarks.lightly_worker", json.dumps(settings)], check=True, env=environment)
    return folder / "out" / "exported_models" / "exported_last.pt", epochs


def main(
    dataset: str,
    python: Annotated[str, typer.Option(help="The interpreter of the environment with lightly-train.")],
    backbone: Annotated[str, typer.Option(help=f"One of {', '.join(BACKBONES)}.")] = [*BACKBONES][0],
    seed: int = 0,
    method: str = "simclr",
    limit: Annotated[int, typer.Option(help="Training images at most; a trial, whose result is only printed.")] = 0,
    folder: Annotated[Path, typer.Option("--run", help="Folder of the runs.")] = Path("runs/lightly"),
) -> None:
    """Train by lightly-train, and score its features."""
    cell = Cell(dataset, "unlabeled-distilled", backbone, seed)
    recipe = cell.recipe(limit)
    with watching() as watch:
        run = begin(folder / f"{cell.name.replace('/', '-')}-{limit}", recipe, watch)
        began = time.perf_counter()
        checkpoint, epochs = train(run, python, method)
        peer = PlainExecutor(backbones.load(backbone, f"file:{checkpoint}"), WeightCache(2**30))
        pixels = (run.inputs(split) for split in SPLITS)
        train_features, test_features = (embed.frozen(peer, embed.normalized(x, run.preprocessing)) for x in pixels)
        found = scored(run, train_features, test_features)
    about = {"dataset": dataset, "row": "unlabeled-lightly", "backbone": backbone, "seed": seed, "method": method}
    size = checkpoint.stat().st_size
    about |= {
        "steps": epochs * len(run.images) // BATCH,
        "bytes": size,
        "seconds": round(time.perf_counter() - began, 1),
    }
    result = about | found | {"images": len(run.images), "test_images": len(run.held_out)}
    if not limit:
        write_json(RESULTS / f"{dataset}-unlabeled-lightly-{backbone}-{seed}.json", result)
    print(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
