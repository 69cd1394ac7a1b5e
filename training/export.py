"""Stage 5: everything that was trained, as a bundle.

python -m training.export --run runs/cifar --out model_store/cifar/1
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from cascade.bundle.format import Bundle, strip_prefix, write
from cascade.bundle.schema import BackboneCard, Card, MaskCard, RouterCard
from cascade.bundle.thumbnails import make
from cascade.model.fusion import Mode
from cascade.model.heads import Bank, Linear
from cascade.model.masks import Mask, density, difference
from cascade.model.out_of_domain import OutOfDomain
from cascade.model.router import KINDS, Calibration, Router
from training.cli import Watch, main, parser
from training.clusters import SUMMARY
from training.evaluate import Features, collect, fit_probe, fusions
from training.run import Run, read_json, resume

THUMBNAILS = "put small pictures of the neighbors' images into the bundle, for all who may use it"


def train(run: Run, features: Features, accuracy: dict[str, Any], out: Path, *, thumbnails: bool = False) -> Path:
    """Fit fusion and heads, and write the bundle to ``out`` (``<name>/<version>``), with pictures on wish."""
    fitted = fusions(run, features)
    labels = run.images.labels
    masks = (run.dispatcher, *run.experts)
    summary = read_json(run.folder / SUMMARY)
    rows = _bank_rows(run)
    bundle = Bundle(
        name=out.parent.name,
        version=out.name,
        card=_card(run, masks, len(fitted["dispatcher"][0].bias), summary, accuracy),
        preprocessing=run.preprocessing,
        dispatcher=masks[0],
        experts=masks[1:],
        router=router_of(run),
        calibration=Calibration(summary["slope"], summary["intercept"]) if summary else Calibration(),
        ood=ood_of(run),
        fusions={mode: fusion for mode, (fusion, _) in fitted.items()},
        linear={} if labels is None else {m: _linear(e, labels, run.images.classes) for m, (_, e) in fitted.items()},
        banks=_banks(run, {mode: embeddings for mode, (_, embeddings) in fitted.items()}),
        thumbnails=make(map(run.images.open, rows)) if thumbnails and len(rows) else None,
    )
    return write(bundle, out)


def router_of(run: Run) -> Router | None:
    """The router that was fitted in this run."""
    if not run.recipe.clusters:
        return None
    kind = next(k for k in KINDS if k.kind == run.recipe.router)
    return kind(**strip_prefix(run.clusters, "router."))


def ood_of(run: Run) -> OutOfDomain:
    """The out-of-domain score that was fitted in this run."""
    return OutOfDomain(**strip_prefix(run.clusters, "ood."))


def _card(run: Run, masks: tuple[Mask, ...], dim: int, summary: dict[str, Any], accuracy: dict[str, Any]) -> Card:
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
        router=RouterCard(**{k: summary[k] for k in RouterCard.model_fields}) if recipe.clusters else None,
        mode=recipe.mode if recipe.clusters else "dispatcher",
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


def _linear(embeddings: Tensor, labels: np.ndarray, classes: list[str]) -> Linear:
    """The linear probe on embeddings [N, dim], its scaling folded in."""
    scale = embeddings.std()  # their mean is zero already
    fitted = fit_probe(embeddings / scale, torch.from_numpy(labels))
    weight, bias = torch.from_numpy(fitted.coef_).float(), torch.from_numpy(fitted.intercept_).float()
    if len(weight) == 1:  # scikit-learn keeps one row for two classes
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    # A class that has only held-out images keeps its place, and is never the answer.
    every = Linear(torch.zeros(len(classes), embeddings.shape[1]), torch.full((len(classes),), -1e9))
    every.weight[fitted.classes_], every.bias[fitted.classes_] = weight / scale, bias
    return every


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
    """An image's name as a bank holds it."""
    return " ".join(name.split())


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("--out", type=Path, required=True, help="<store>/<name>/<version>, must not exist")
    arguments.add_argument("--thumbnails", action="store_true", help=THUMBNAILS)
    options = arguments.parse_args()

    def stage(watch: Watch) -> None:
        run = resume(options.run, watch)
        path = run.folder / "evaluation.json"
        accuracy = read_json(path) if path.exists() else {}
        watch.say(f"wrote {train(run, collect(run), accuracy, options.out, thumbnails=options.thumbnails)}")

    main(stage)
