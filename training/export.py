"""Stage 5: export a trained run as a bundle.

python -m training.export --run runs/cifar --out model_store/cifar/1
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor
from torch.nn.functional import normalize

from cascade.bundle.format import Bundle, write
from cascade.bundle.schema import BackboneCard, Card, DomainCard, MaskCard, RouterCard
from cascade.bundle.thumbnails import make
from cascade.model.fusion import Identity, Mode
from cascade.model.heads import Bank, Linear
from cascade.model.masks import Mask, density, difference, frozen
from cascade.model.out_of_domain import OutOfDomain
from cascade.model.router import Calibration
from training import domains, heads, labeled_experts, maps, new_classes, precision
from training.cli import RUN, RunFolder, stage, start
from training.clusters import SUMMARY, fit_ood
from training.deferral import Larger
from training.evaluate import Features, collect, fusions
from training.frozen import Candidate
from training.routing import ood_of, router_of
from training.run import Run, read_json, resume

EXTENSIBLE = "With --labels: keep what cascade heads add needs for new classes, about 1.7 MB."
THUMBNAILS = "Store small pictures of the neighbors' images in the bundle; everyone who may use it sees them."


def export(run: Run, features: Features, accuracy: dict[str, Any], out: Path, *, thumbnails: bool = False) -> Path:
    """Fit fusion and heads, and write the bundle to ``out`` (``<name>/<version>``)."""
    labels = run.images.labels
    if run.recipe.labels:
        fitted, linear = labeled_experts.fusions(run, features), labeled_experts.linear(run, features)
    else:
        fitted = fusions(run, features)
        linear = {} if labels is None else {m: _linear(own.train, labels, run) for m, own in fitted.items()}
    masks = (run.dispatcher, *run.experts)
    summary = read_json(run.folder / SUMMARY)
    rows = _bank_rows(run)
    domain, where = domains.of_run(run)
    bundle = Bundle(
        name=out.parent.name,
        version=out.name,
        card=_card(run, masks, len(fitted["dispatcher"].fusion.bias), summary, accuracy, where),
        domain=domain,
        preprocessing=run.preprocessing,
        dispatcher=masks[0],
        experts=masks[1:],
        router=router_of(run),
        calibration=Calibration(summary["slope"], summary["intercept"]) if summary else Calibration(),
        ood=ood_of(run),
        fusions={mode: own.fusion for mode, own in fitted.items()},
        linear=linear,
        banks=_banks(run, {mode: own.train for mode, own in fitted.items()}),
        thumbnails=make(map(run.images.open, rows)) if thumbnails and len(rows) else None,
    )
    mapped = _mapped(bundle, features.assigned[rows] if run.recipe.clusters else None)
    measured = {"clusters": summary["reliability"]} if "reliability" in summary else {}
    if bundle.linear and run.held_out.labels is not None:
        mode = bundle.card.mode
        embeddings = fitted[mode].test.numpy()
        measured["labels"] = heads.reliability_of(bundle.linear[mode], embeddings, run.held_out.labels)
    return write(_measured(run, mapped, measured), out)


def export_classifier(
    run: Run,
    chosen: Candidate,
    accuracy: dict[str, Any],
    out: Path,
    *,
    thumbnails: bool = False,
    extensible: bool = False,
    larger: Larger | None = None,
) -> Path:
    """Write a bundle that serves a calibrated head, on the frozen backbone or on a trained mask.

    The embedding is the network's features without a projection. An extensible bundle can learn new classes later.
    """
    mask = frozen(run.backbone) if chosen.name == "frozen" else run.mask(chosen.name, run.mask_from)
    features = torch.from_numpy(run.features(chosen.name)[0])
    rows = _bank_rows(run)
    head = Linear(chosen.head.weight.half(), chosen.head.bias)
    domain, where = domains.of_run(run)
    bundle = Bundle(
        name=out.parent.name,
        version=out.name,
        card=_card(run, (replace(mask, name="dispatcher"),), run.backbone.features, {}, accuracy, where),
        domain=domain,
        preprocessing=run.preprocessing,
        dispatcher=replace(mask, name="dispatcher"),
        experts=(),
        router=None,
        calibration=Calibration(),
        ood=None if chosen.name == "frozen" else _ood(run, chosen.name),
        fusions={"dispatcher": Identity.of(run.backbone.features)},
        linear={"dispatcher": head},
        banks=_banks(run, {"dispatcher": features}),
        discriminant=new_classes.fit(run, chosen.name) if extensible else None,
        thumbnails=make(map(run.images.open, rows)) if thumbnails and len(rows) else None,
    )
    measured = {}
    if run.held_out.labels is not None:
        measured["labels"] = heads.reliability_of(head, run.features(chosen.name)[1], run.held_out.labels)
    bundle = _measured(run, _mapped(bundle), measured)
    return write(bundle if larger is None else larger.attach(bundle), out)


def _mapped(bundle: Bundle, assigned: np.ndarray | None = None) -> Bundle:
    """Add the map; ``assigned`` is the cluster of each row of the bank, int64 [rows]."""
    if (bank := bundle.banks.get(bundle.card.mode)) is None:
        return bundle
    return replace(bundle, map=maps.fit(bank, None if assigned is None else torch.from_numpy(assigned)))


def _measured(run: Run, bundle: Bundle, measured: dict[str, Any]) -> Bundle:
    """Put the reliability of labels and clusters into the card, and what reduced precision changes."""
    moved = precision.measure(bundle, run.executor, run.inputs("test"))
    accuracy = bundle.card.accuracy | ({"reliability": measured} if measured else {}) | {"precision": moved}
    return replace(bundle, card=bundle.card.model_copy(update={"accuracy": accuracy}))


def _ood(run: Run, name: str) -> OutOfDomain:
    train, test = run.features(name)
    return fit_ood(train, test[::2])


def _card(
    run: Run, masks: tuple[Mask, ...], dim: int, summary: dict[str, Any], accuracy: dict[str, Any], where: DomainCard
) -> Card:
    backbone, recipe = run.backbone, run.recipe
    kept = {k: v for k, v in asdict(recipe).items() if k not in ("data", "source")}
    return Card(
        format=1,
        backbone=BackboneCard.of(backbone),
        preprocessing=run.preprocessing.to_json(),
        masks=[
            MaskCard(
                name=mask.name,
                start=mask.start,
                weights=backbone.weights.numel() - backbone.offset(mask.start),
                density=round(density(backbone, mask), 4),
                differs_from_dispatcher=round(difference(mask, masks[0], backbone), 4),
            )
            for mask in masks
        ],
        router=RouterCard(**{k: summary[k] for k in RouterCard.model_fields}) if summary else None,
        domain=where,
        mode=recipe.mode if summary else "dispatcher",
        dim=dim,
        classes=run.images.classes if run.images.labels is not None else [],
        training={
            "data": Path(recipe.data).name,  # a name, never a path of the machine that it was trained on
            "images": len(run.images),
            "data_fingerprint": run.images.fingerprint(),
            "recipe": kept,
            "calibration_error": summary.get("calibration_error"),
        },
        accuracy=accuracy,
    )


def _linear(embeddings: Tensor, labels: np.ndarray, run: Run) -> Linear:
    """Fit a logistic regression on embeddings [N, dim], with its penalty chosen by cross-validation."""
    return heads.fit(embeddings.numpy(), labels, len(run.images.classes), seed=run.recipe.seed).head


def _banks(run: Run, embeddings: dict[Mode, Tensor]) -> dict[Mode, Bank]:
    """The same seeded choice of training images for every mode."""
    images, rows = run.images, _bank_rows(run)
    if not len(rows):
        return {}
    names = tuple(one_line(images.names[i]) for i in rows)
    labels = () if images.labels is None else tuple(images.classes[images.labels[i]] for i in rows)
    return {mode: Bank(normalize(e[rows]).half(), names, labels) for mode, e in embeddings.items()}


def _bank_rows(run: Run) -> np.ndarray:
    order = np.random.default_rng(run.recipe.seed).permutation(len(run.images))
    return np.sort(order[: run.recipe.bank])


def one_line(name: str) -> str:
    """An image's name in the form that a bank stores."""
    return " ".join(name.split())


def command(
    out: Annotated[Path, typer.Option(help="Bundle to write: <store>/<name>/<version>.")],
    run: RunFolder = RUN,
    thumbnails: Annotated[bool, typer.Option("--thumbnails", help=THUMBNAILS)] = False,
) -> None:
    """Export a trained run."""
    with stage() as watch:
        trained = resume(run, watch)
        path = trained.folder / "evaluation.json"
        accuracy = read_json(path) if path.exists() else {}
        watch.say(f"wrote {export(trained, collect(trained), accuracy, out, thumbnails=thumbnails)}")


if __name__ == "__main__":
    start(command)
