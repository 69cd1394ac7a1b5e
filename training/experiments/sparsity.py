"""Appendix D, table 4 and figures 2 and 3: shares of active weights, with and without labels.

python -m training.experiments.sparsity
"""

import re
from typing import Any

import torch

from cascade.model import masks
from training.experiments import report
from training.experiments.initialization import CLIP, missing
from training.experiments.lab import DEEP, SWAV, Lab, main, name_of
from training.experiments.report import Table
from training.experiments.supervised import SGD
from training.run import Run

SMALL = DEEP | {"seeds": 2}
SETS = ("cifar10", "cifar100", "dtd", "eurosat", "flowers102", "inatloc500", "pets", "sun397", "ucf101")
PAPER = {"data": SETS, "epochs": 150}
TABLE4 = {
    "rn18-timm": (84.8, 64.3, 92.6, 93.4, 93.1, 51.2, 95.6, 68.0, 89.4),
    "rn50-swav": (89.5, 77.2, 95.1, 95.7, 94.5, 65.4, 96.2, 81.1, 91.7),
    "vitb32-clip": (99.6, 98.7, 99.9, 99.9, 99.9, 94.8, 99.9, 99.3, 99.8),
}
FOUND = {"cifar10": 91.4, "cifar100": 92.5, "dtd": 98.8, "eurosat": 96.7, "flowers102": 98.6, "sun397": 94.4}
PUBLISHED: dict[str, dict[str, float]] = {
    f"{model}, supervised": dict(zip(SETS, shares, strict=True)) for model, shares in TABLE4.items()
} | {"rn50-swav, self-supervised": FOUND | {"ucf101": 95.7}}
MODELS: dict[str, dict[str, dict[str, Any]]] = {
    "small": {
        "EfficientNet-Lite0": {},
        "AugNet ResNet-50": {"backbone": "resnet50", "source": "package:imgsim/model.pth", "mask_from": "layer3"},
    },
    "paper": {
        "rn18-timm": {"backbone": "resnet18", "source": "timm"},
        "rn50-swav": {"source": f"file:{SWAV}"},
        "vitb32-clip": {
            "backbone": "vit_base_patch32_clip_quickgelu_224",
            "source": f"file:{CLIP}",
            "lr": 10.0,
            "warmup": 0.0,
            "epochs": 32,
            "local_crops": 0,
        },
    },
}
VIT_ROWS = ("query", "key", "value")


def experiment(lab: Lab) -> list[Table]:
    """Shares of all weights by model and data set; then by stage, block and kind of parameter, mean over data sets."""
    whole = Table("Table 4: % of the weights that are active", published=PUBLISHED, digits=2)
    parts: dict[tuple[str, str], Table] = {}
    for name in lab.sets():
        short = name_of(name)
        for title, changes in MODELS[lab.preset].items():
            if lack := missing(str(changes.get("source", ""))):
                lab.notes.append(f"not run: {title}: {lack}")
                continue
            for seed in lab.seeds:
                for kind, more in (("supervised", SGD[lab.preset]), ("self-supervised", {})):
                    run = lab.trained(name, seed, **(more | changes))
                    whole.add(f"{title}, {kind}", {short: 100 * masks.density(run.backbone, run.dispatcher)})
                    for part, shares in active(run).items():
                        table = Table(f"Figures 2 and 3: {title} by {part}, % active", digits=2)
                        table = parts.setdefault((title, part), table)
                        for row, share in shares.items():
                            table.add(row, {kind: share})
    for title in dict.fromkeys(title for title, _ in parts):
        _draw(lab, title, {part: table for (model, part), table in parts.items() if model == title})
    return [whole, *parts.values()]


def active(run: Run) -> dict[str, dict[str, float]]:
    """% active of the dispatcher's mask, by stage, block and kind of parameter."""
    mask, backbone = run.dispatcher, run.backbone
    bits = masks.unpack(mask.bits, backbone.weights.numel() - backbone.offset(mask.start))
    counts: dict[str, dict[str, list[int]]] = {"stage": {}, "block": {}, "kind of parameter": {}}
    nth: dict[str, int] = {}
    for segment, part in masks.split(backbone, mask.start, bits):
        nth[segment.parameter] = nth.get(segment.parameter, -1) + 1
        names = {
            "stage": backbone.stages[segment.stage].name,
            "block": block(segment.parameter),
            "kind of parameter": kind_of(segment.parameter, nth[segment.parameter]),
        }
        for what, key in names.items():
            both = counts[what].setdefault(key, [0, 0])
            both[0] += int(torch.count_nonzero(part))
            both[1] += len(part)
    return {what: {k: 100 * on / of for k, (on, of) in rows.items()} for what, rows in counts.items()}


def block(parameter: str) -> str:
    """The block: ``layer1.0`` of ``layer1.0.conv1.weight``, ``blocks.3`` of ``blocks.3.attn.qkv.weight``."""
    found = re.match(r".*?\w+\.\d+(\.\d+(?=\.\w*[a-z]))?(?=\.)", parameter)
    return found.group() if found else parameter.partition(".")[0]


def kind_of(parameter: str, nth: int) -> str:
    """The kind of a parameter without its block: ``conv1.weight``, ``attn.key.bias``."""
    inside = parameter.removeprefix(block(parameter)).strip(".")
    return inside.replace("qkv", VIT_ROWS[nth]) if "qkv" in inside else inside


def _draw(lab: Lab, title: str, tables: dict[str, Table]) -> None:
    panels = {}
    for part, table in tables.items():
        kinds = dict.fromkeys(c for row in table.cells.values() for c in row)
        panels[part] = {
            kind: (list(range(len(table.cells))), [table.mean(row, kind) for row in table.cells]) for kind in kinds
        }
    stem = re.sub(r"\W+", "-", title)
    report.draw(lab.path(f"sparsity.{stem}.png"), panels, "first to last", "% active", "o-")


if __name__ == "__main__":
    main(experiment, SMALL, PAPER)
