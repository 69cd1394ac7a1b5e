"""``cascade import``: a fine-tuned copy of a backbone as a bundle with a 1-bit delta.

Without images this takes seconds. With ``--distill`` the deltas are then trained on unlabeled images, so that the
pooled features match those of the fine-tuned copy. Small networks lose most of their gain without that.
"""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import mse_loss

from cascade.bundle.format import Bundle, read, strip_prefix, write
from cascade.bundle.schema import BackboneCard, Card, MaskCard
from cascade.engine.engine import Engine
from cascade.engine.executors.plain import PlainExecutor
from cascade.engine.results import Options, Prediction
from cascade.engine.weight_cache import WeightCache
from cascade.errors import CascadeError
from cascade.model import backbone as backbones
from cascade.model import decoding, finetuned
from cascade.model.backbone import Backbone
from cascade.model.delta import Loss, compress
from cascade.model.finetuned import FineTuned
from cascade.model.fusion import Identity
from cascade.model.heads import Linear
from cascade.model.masks import Mask, unpack
from cascade.model.preprocessing import Preprocessing
from cascade.model.router import Calibration
from training import domains
from training.run import DELTA, Run, device, write_tensors

BATCH = 64
RATES = {"deltas": 2e-4, "channels": 5e-4}  # of Adam
DISTILL_STEPS = 300  # of a delta that is trained in a run
IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


def import_copy(
    checkpoint: Path,
    backbone: Backbone,
    out: Path,
    *,
    classes: list[str] | None = None,
    size: int | None = None,
    distill: Path | None = None,
    domain: Path | None = None,
    steps: int = 100,
    seed: int = 0,
) -> tuple[Path, FineTuned, list[Loss]]:
    """Write the bundle of a fine-tuned copy to ``out`` (``<name>/<version>``).

    Args:
        checkpoint: see ``cascade.model.finetuned.read``.
        classes: names of the classifier's rows; default: numbers.
        size: side of the images, pixels; default: the backbone's own.
        distill: folder of images to train the deltas on, for ``steps`` steps of 64 images.
        domain: folder of typical images, so that images can be dispatched to the bundle.

    Raises:
        CascadeError: the checkpoint is not a copy of this backbone, or the number of names differs from its classes.
    """
    tuned = finetuned.read(checkpoint, backbone)
    rows = 0 if tuned.weight is None else len(tuned.weight)
    names = [str(i) for i in range(rows)] if classes is None else classes
    if len(names) != rows:
        raise CascadeError(f"{checkpoint} has {rows} classes, but {len(names)} names are given: give one for each")
    view = Preprocessing.of(backbone.config, size)
    mask, losses = compress(backbone, tuned.state)
    if distill is not None:
        batches = _batches(images_in(distill), view, steps, seed)
        mask = fit_deltas(backbone, mask, tuned.state, track(batches, "distilling", total=steps), steps)
    weights = backbone.weights.numel() - backbone.offset(mask.start)
    executor = PlainExecutor(backbone, WeightCache(2**34))
    found, stage = (None, None) if domain is None else domains.of_files(executor, images_in(domain), view)
    heads = {} if tuned.weight is None or tuned.bias is None else {"dispatcher": Linear(tuned.weight, tuned.bias)}
    bundle = Bundle(
        name=out.parent.name,
        version=out.name,
        card=Card(
            format=2,
            backbone=BackboneCard.of(backbone),
            preprocessing=view.to_json(),
            masks=[MaskCard(name=mask.name, start=mask.start, weights=weights, density=1.0)],
            domain=stage,
            mode="dispatcher",
            dim=backbone.features,
            classes=names,
            training={"imported": checkpoint.name, "distilled_steps": steps if distill is not None else 0},
        ),
        preprocessing=view,
        dispatcher=mask,
        experts=(),
        router=None,
        calibration=Calibration(),
        ood=None,
        domain=found,
        fusions={"dispatcher": Identity.of(backbone.features)},
        linear=dict(heads),  # type: ignore[arg-type]
    )
    return write(bundle, out), tuned, losses


def of_run(run: Run, name: str) -> None:
    """Compress a training of every weight in a run to a 1-bit delta, distilled on its images, and store it.

    Args:
        name: of the finished training.
    """
    path = run.folder / name / DELTA
    if path.exists():
        return
    run.watch.say(f"{name}: distilling the 1-bit delta")
    backbone = backbones.load(run.recipe.backbone, run.recipe.source, device=device())  # no executor has written to it
    tuned = fine_tuned(backbone, run.trained(name))
    steps = min(DISTILL_STEPS, run.steps)
    mask = fit_deltas(backbone, compress(backbone, tuned)[0], tuned, random_batches(run, steps), steps)
    parts = {"norms": mask.norms, "channels": mask.channels, "deltas": mask.deltas}
    tensors = {f"{part}.{n}": t for part, own in parts.items() for n, t in own.items()}
    write_tensors(path, tensors | {"bits": mask.bits, "start": torch.tensor(mask.start)})


def fine_tuned(backbone: Backbone, trained: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a copy whose weights were trained, from the tensors of its training."""
    return backbone.model.state_dict() | strip_prefix(trained, "weights.") | strip_prefix(trained, "norms.")


def random_batches(run: Run, steps: int) -> Iterator[Tensor]:
    """Yield random batches of training images, half of them mirrored: float32 [64, 3, S, S]."""
    pixels, generator = run.inputs("train"), np.random.default_rng(run.recipe.seed)
    for _ in range(steps):
        rows = generator.choice(len(pixels), min(BATCH, len(pixels)), replace=False)
        yield _half_mirrored(run.preprocessing.normalize(pixels[rows]), generator)


def fit_deltas(
    backbone: Backbone,
    mask: Mask,
    tuned: dict[str, Tensor],
    batches: Iterable[Tensor],
    steps: int,
) -> Mask:
    """Train a delta's numbers, scales and shifts, so that pooled features match the fine-tuned copy's (squared error).

    Args:
        tuned: the copy's state dict.
        batches: inputs without labels, float32 [B, 3, S, S], one for each of the ``steps``.
    """
    teacher, student = (_fixed(backbone, state) for state in (tuned, {**mask.norms, **mask.channels}))
    pristine = {n: _channels_last(backbone.model.get_parameter(n).detach()) for n in mask.deltas}
    active = unpack(mask.bits, backbone.weights.numel() - backbone.offset(mask.start))
    signs = {n: _channels_last(_sign(backbone, mask, active, n).to(backbone.weights.device)) for n in mask.deltas}
    trained = {
        kind: {n: nn.Parameter(t.float().to(backbone.weights.device)) for n, t in group.items()}
        for kind, group in (("deltas", mask.deltas), ("channels", mask.channels))
    }
    groups = [{"params": list(group.values()), "lr": RATES[kind]} for kind, group in trained.items() if group]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    for batch in batches:
        x = _channels_last(batch.to(backbone.weights.device))
        with torch.no_grad():
            wanted = teacher(x)
        shaped = {n: d.view(-1, *[1] * (pristine[n].dim() - 1)) for n, d in trained["deltas"].items()}
        weights = {n: pristine[n] + signs[n] * shaped[n] for n in shaped}
        loss = mse_loss(functional_call(student, weights | trained["channels"], (x,)), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    deltas, channels = ({n: p.detach().half().cpu() for n, p in group.items()} for group in trained.values())
    return replace(mask, deltas=deltas, channels=channels)


def _fixed(backbone: Backbone, state: dict[str, Tensor]) -> nn.Module:
    """A copy of the network with these tensors, in evaluation mode, whose own parameters do not learn."""
    model = copy.deepcopy(backbone.model).eval().requires_grad_(False)
    model.load_state_dict(state, strict=False)
    return model.to(memory_format=torch.channels_last)  # 1.5 times as fast on a CPU


def _channels_last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last) if x.dim() == 4 else x


def _sign(backbone: Backbone, mask: Mask, active: Tensor, name: str) -> Tensor:
    """The signs of one weight, float32, 1 or -1."""
    first = backbone.offset(mask.start)
    begin, end = (index - first for index in backbone.spans[name])
    return torch.where(active[begin:end], 1.0, -1.0).view(backbone.model.get_parameter(name).shape)


def _batches(images: list[Path], view: Preprocessing, steps: int, seed: int) -> Iterator[Tensor]:
    """Yield random batches of images, half of them mirrored."""
    generator, transform = np.random.default_rng(seed), view.transform()
    for _ in range(steps):
        files = generator.choice(len(images), min(BATCH, len(images)), replace=False)
        yield _half_mirrored(torch.stack([transform(decoding.read(images[i])) for i in files]), generator)


def _half_mirrored(x: Tensor, generator: np.random.Generator) -> Tensor:
    mirrored = torch.from_numpy(generator.random(len(x)) < 0.5)
    return torch.where(mirrored[:, None, None, None], x.flip(3), x)


def images_in(folder: Path) -> list[Path]:
    """Image files in a folder, at any depth.

    Raises:
        CascadeError: there are none.
    """
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGES)
    if not files:
        raise CascadeError(f"no images in {folder}: give a folder of {' '.join(sorted(IMAGES))} files")
    return files


def compare(bundle: Path, backbone: Backbone, tuned: FineTuned, folder: Path) -> tuple[float, float]:
    """Measure the accuracy of the fine-tuned copy and of the bundle on images in class folders.

    Raises:
        CascadeError: the copy has no classifier, or a folder is not one of its classes.
    """
    found, files = read(bundle), images_in(folder)
    truth = [file.relative_to(folder).parts[0] for file in files]
    if tuned.weight is None or not set(truth) <= set(found.card.classes):
        raise CascadeError(f"{folder} needs a folder for each class: {' '.join(found.card.classes) or 'no classifier'}")
    model = copy.deepcopy(backbone.model).eval()
    model.load_state_dict(tuned.state, strict=False)
    engine, transform = Engine(executor="plain"), found.preprocessing.transform()
    engine.add(found)
    right = np.zeros(2)
    for begin in track(range(0, len(files), BATCH), "comparing"):
        pictures = [decoding.read(file) for file in files[begin : begin + BATCH]]
        with torch.inference_mode():
            scores = nn.functional.linear(model(torch.stack([*map(transform, pictures)])), tuned.weight, tuned.bias)
        before = [found.card.classes[i] for i in scores.argmax(dim=1).tolist()]
        answers = engine.predict(pictures, Options(labels=1))
        after = [a.labels[0].name if isinstance(a, Prediction) else "" for a in answers]
        own = truth[begin : begin + BATCH]
        right += [sum(a == b for a, b in zip(side, own, strict=True)) for side in (before, after)]
    return float(right[0] / len(files)), float(right[1] / len(files))


def load_backbone(name: str, source: str, weights: Path | None) -> Backbone:
    """The backbone that the copy was fine-tuned from."""
    return backbones.load(name, source, weights)
