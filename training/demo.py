"""The demo store: models of several customers over one backbone, each trained another way. ``make train-demo``

    python -m training.demo                  # all of them: runs/demo/<name>, runs/demo/store/<name>/1
    python -m training.demo digits --quick   # a few steps on a few images, to see that everything works

It goes on where it was stopped. ``model_store`` is what this command wrote.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch.nn.functional import normalize

from cascade.bundle.format import read, strip_prefix, write
from cascade.bundle.thumbnails import make
from cascade.engine.engine import Engine
from cascade.engine.results import Options, Prediction
from cascade.errors import CascadeError
from cascade.model.heads import Bank, Linear
from cascade.model.reliability import reliability
from training import comparison, delta, dispatcher, embed, finetune, heads, maps, pipeline, seeds
from training.cli import RunFolder, Watch, stage, start
from training.data.dataset import Images
from training.recipe import Recipe
from training.run import Run, begin, write_tensors
from training.tuned import tune_backbone

CUSTOMERS = {
    # Labels: a mask, scales and shifts, and a head.
    "objects": Recipe("cifar10", limit=20_000, test_limit=4_000, size=96, labels=True, steps=1_000),
    # A copy that was fine-tuned elsewhere, imported as a 1-bit delta.
    "clothes": Recipe(
        "fashion-mnist",
        limit=20_000,
        test_limit=4_000,
        size=64,
        labels=True,
        optimizer="adamw",
        lr=0.001,
        weight_decay=1e-4,
    ),
    # Few images, but larger ones.
    "groceries": Recipe("fruit", size=160, batch=32, labels=True),
    # No labels: distilled from a larger input size; it answers with its neighbors.
    "digits": Recipe("digits", test_limit=4_000, size=64),
    # The paper's cascade: SwAV, five clusters, three seeds with all controls.
    "paper": Recipe(
        "cifar10",
        limit=10_000,
        test_limit=3_000,
        size=64,
        mask_from="blocks.6",
        batch=128,
        steps=600,
        expert_steps=300,
        objective="swav",
        adapt="mask",
        clusters=5,
        local_crops=0,
        draws=8,
        dim=128,
        bank=500,
    ),
}
PICTURES = 100  # images in the neighbor bank of a bundle with a head: a person sees what it knows
DIGITS_BANK, DIGITS_DIM = 4_000, 64  # it answers with its neighbors: 500 of them would cost six points of accuracy
FILES, STEPS = 4_000, 200  # the import of ``clothes``: images, and steps of its distillation
BATCH = 64
QUICK = {"limit": 400, "test_limit": 100, "steps": 20, "expert_steps": 4, "batch": 32}


def customer(name: str, folder: Path, out: Path, watch: Watch, *, quick: bool = False) -> None:
    """Train one customer in ``folder`` and write its bundle to ``out``."""
    recipe = CUSTOMERS[name]
    if quick:
        recipe = replace(recipe, **QUICK, clusters=min(2, recipe.clusters))  # type: ignore[arg-type]
    if name == "paper":
        seeds.train(folder, recipe, out, watch)
        return
    run = begin(folder, recipe, watch)
    if name == "clothes":
        fine_tuned(run, out, steps=4 if quick else STEPS)
        return
    # What a bundle keeps beside the mask is no setting of its training: the run stays as it was begun.
    bank, dim = (PICTURES, recipe.dim) if recipe.labels else (DIGITS_BANK, DIGITS_DIM)
    served = Run(folder, replace(recipe, bank=bank, dim=dim), watch)
    if recipe.labels:
        pipeline.train(served, out, thumbnails=True)
        return
    with tempfile.TemporaryDirectory() as temporary:
        whole = read(pipeline.train(served, Path(temporary) / name / "1", thumbnails=True))
    known = {name: facts for name, facts in whole.card.accuracy["reliability"].items() if name != "labels"}
    accuracy = whole.card.accuracy | {"reliability": known}
    card = whole.card.model_copy(update={"accuracy": accuracy})
    write(replace(whole, linear={}, card=card), out)  # a head needs labels


def fine_tuned(run: Run, out: Path, steps: int) -> None:
    """Fine-tune every weight, save the copy as timm would, and import it as a person does: with files of images.

    Args:
        steps: of the distillation.
    """
    model = tune_backbone(run.backbone, run.mask_from, train_norms=run.recipe.train_norms)
    dispatcher.train(run, model=model)
    found = finetune.features(model, embed.normalized(run.inputs("test"), run.preprocessing))
    trained = run.trained("dispatcher")
    head = strip_prefix(trained, "objective.")
    pristine = delta.load_backbone(run.recipe.backbone, run.recipe.source, None)
    state = pristine.model.state_dict() | strip_prefix(trained, "weights.") | strip_prefix(trained, "norms.")
    copy = run.folder / "copy.safetensors"
    write_tensors(copy, state | {f"classifier.{n}": t for n, t in head.items()})
    folder, classes, side = files(run), run.images.classes, run.recipe.size
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / out.parent.name / "1"
        delta.import_copy(copy, pristine, path, classes=classes, size=side, distill=folder, domain=folder, steps=steps)
        bundle = read(path)
    engine = Engine(executor="plain")
    engine.add(bundle)
    assert run.held_out.labels is not None
    answers = [*predict(engine, run.held_out, np.arange(len(run.held_out)))]
    right = [a.labels[0].name == classes[label] for a, label in zip(answers, run.held_out.labels, strict=True)]
    score = heads.accuracy(Linear(head["weight"], head["bias"]), found, run.held_out.labels)
    rows = {
        comparison.TITLES["fine-tuned"]: {"validation": None, "test": round(score, 4), "bytes": copy.stat().st_size},
        comparison.TITLES["delta"]: {
            "validation": None,
            "test": round(float(np.mean(right)), 4),
            "bytes": sum(bundle.card.bytes.values()),
        },
    }
    run.watch.show(comparison.show({"rows": rows}))
    sure = reliability(np.array([answer.labels[0].score for answer in answers]), np.array(right, float))
    facts = {
        "serves": "delta",
        "held_out_images": len(run.held_out),
        "rows": rows,
        "reliability": {"labels": sure},
    }
    card = bundle.card.model_copy(update={"accuracy": facts})
    write(replace(bundle, card=card, **neighbors(run, engine)), out)


def files(run: Run) -> Path:
    """A folder with a sample of the training images, as PNG files."""
    folder, images = run.folder / "images", run.images
    folder.mkdir(exist_ok=True)
    for i in np.random.default_rng(run.recipe.seed).permutation(len(images))[:FILES].tolist():
        path = folder / f"{i:05d}.png"
        if not path.exists():
            images.open(i).save(path)
    return folder


def neighbors(run: Run, engine: Engine) -> dict[str, Any]:
    """``PICTURES`` training images as a neighbor bank, with thumbnails and map: fields of the engine's bundle."""
    images = run.images
    rows = np.sort(np.random.default_rng(run.recipe.seed).permutation(len(images))[:PICTURES])
    embeddings = torch.from_numpy(
        np.stack([a.embedding for a in predict(engine, images, rows) if a.embedding is not None])
    )
    assert images.labels is not None
    labels = tuple(images.classes[images.labels[i]] for i in rows)
    bank = Bank(normalize(embeddings).half(), tuple(images.names[i] for i in rows), labels)
    return {"banks": {"dispatcher": bank}, "thumbnails": make(images.open(i) for i in rows), "map": maps.fit(bank)}


def predict(engine: Engine, images: Images, rows: np.ndarray) -> Iterator[Prediction]:
    """Answers of an engine with one bundle, in batches."""
    for first in range(0, len(rows), BATCH):
        batch = [images.open(i) for i in rows[first : first + BATCH]]
        for answer in engine.predict(batch, Options(embedding=True, labels=1), on_error="raise"):
            assert answer.ok
            yield answer


def command(
    names: Annotated[
        list[str] | None, typer.Argument(help=f"Customers; all by default: {', '.join(CUSTOMERS)}.")
    ] = None,
    run: RunFolder = Path("runs/demo"),
    out: Annotated[Path | None, typer.Option(help="Store to write; <run>/store by default.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few steps on a few images.")] = False,
) -> None:
    """Train the demo store."""
    if unknown := [name for name in names or () if name not in CUSTOMERS]:
        raise CascadeError(f"no customer {unknown[0]}: name some of {', '.join(CUSTOMERS)}")
    with stage() as watch:
        for name in names or CUSTOMERS:
            bundle = (out or run / "store") / name / "1"
            if bundle.exists():
                watch.say(f"{bundle} is there")
                continue
            watch.say(f"[bold]{name}[/]")
            customer(name, run / name, bundle, watch, quick=quick)
            watch.say(f"wrote {bundle}: {sum(file.stat().st_size for file in bundle.iterdir()) / 1e6:.2f} MB")


if __name__ == "__main__":
    start(command)
