"""The folder of a training run, through which the stages exchange their results.

runs/cache/              decoded images, trunk features and teacher features, shared by neighboring runs
runs/<name>/recipe.json
            train.json  test.json           how many images there were, and which could not be read
            frozen/                         features of the frozen backbone
            dispatcher/  checkpoint.safetensors -> done.safetensors, curve.jsonl, features
            clusters.safetensors  clusters.json
            expert-0/ .. expert-K/
            equal-steps/  zero-rate/        controls, if --controls asked for them
            evaluation.json
"""

import hashlib
import json
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from cascade import atomic
from cascade.bundle.format import strip_prefix
from cascade.engine.executors.plain import PlainExecutor
from cascade.engine.weight_cache import WeightCache
from cascade.errors import CascadeError
from cascade.model import backbone as backbones
from cascade.model.backbone import Backbone
from cascade.model.masks import Mask
from cascade.model.preprocessing import Preprocessing
from training import distributed, embed
from training.checkpoint import DONE
from training.cli import Watch
from training.data import dataset, feature_cache
from training.data.dataset import Images
from training.masking import MaskedModel, mask_backbone, select, to_mask
from training.memory import expect
from training.objectives import SHIFT
from training.recipe import Recipe
from training.tuned import tune_backbone

FEATURES = "features.safetensors"
DELTA = "delta.safetensors"  # of a training that fine-tuned every weight
CLUSTERS = "clusters.safetensors"
CACHE_MARGIN = 1.15  # training images are cached a little larger than the network's input, for the crops
FEWEST = 16  # fewest images to train a mask on
VALIDATION = 0.05  # share of the labeled training images for choosing checkpoints, and between mask and head
LEAST_VALIDATION, MOST_VALIDATION = 300, 1000  # bounds of their number, but never more than a fifth
STEPS = {"labels": 1500, "distill": 2400}  # for STEPS_IMAGES images; they grow with the square root
LEAST_STEPS = {"labels": 300, "distill": 1200}  # a teacher keeps a few hundred images from being learned by heart
STEPS_IMAGES, MOST_STEPS = 20_000, 6000
SWAV_STEPS = 600
Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")


@dataclass
class Run:
    """An open run: its folder and recipe; its images and backbone are loaded on first use.

    Attributes:
        planned: steps that fit into --minutes; 0: the recipe's.
        suffix: of a run beside another one, shown with the names of its masks.
    """

    folder: Path
    recipe: Recipe
    watch: Watch
    planned: int = 0
    suffix: str = ""

    @cached_property
    def backbone(self) -> Backbone:
        return backbones.load(self.recipe.backbone, self.recipe.source, device=device())

    @cached_property
    def executor(self) -> PlainExecutor:
        return PlainExecutor(self.backbone, WeightCache(2**34))

    @cached_property
    def preprocessing(self) -> Preprocessing:
        r = self.recipe
        return Preprocessing.of(self.backbone.config, r.size or None, r.crop_pct or None)

    @cached_property
    def images(self) -> Images:
        r, clusters = self.recipe, self.recipe.clusters
        images = dataset.load(r.data, "train", r.limit or None, r.data_seed)
        if len(images) < FEWEST * max(1, clusters):
            masks, less = f"a mask, which needs {FEWEST}", ""
            if clusters:
                masks, less = f"{clusters} clusters of {FEWEST}", ", or lower --clusters"
            raise CascadeError(f"{len(images)} training images are too few for {masks}: add some{less}")
        if images.labels is not None and len(np.unique(images.labels)) < 2:
            only = images.classes[images.labels[0]]
            raise CascadeError(f"all training images are in the class folder {only}: add others, or drop the folders")
        return self._known("train", images)

    @cached_property
    def held_out(self) -> Images:
        images = dataset.load(self.recipe.data, "test", self.recipe.test_limit or None, self.recipe.data_seed)
        if len(images) < 2:
            raise CascadeError(f"{len(images)} test image is too few to calibrate with: at least two are needed")
        return self._known("test", images)

    def _known(self, split: str, images: Images) -> Images:
        """Check that a resumed run has the same images; a file in its folder lists those that were left out."""
        facts = {"images": len(images), "fingerprint": images.fingerprint(), "broken": dict(images.broken)}
        path = self.folder / f"{split}.json"
        known = read_json(path) if path.exists() else None
        if known and known["fingerprint"] != facts["fingerprint"]:
            raise CascadeError(
                f"the {split} images of {self.recipe.data} are not those that {self.folder} was started with:"
                " put them back, or choose another --run folder"
            )
        if known != facts:  # skip if unchanged: experts that train in parallel share this file
            write_json(path, facts)
        return images

    @cached_property
    def pixels(self) -> np.ndarray:
        """The training images, uint8 [N, 3, S, S], for SwAV a little larger than the input because of the crops."""
        if self.recipe.kind != "swav":
            return self.inputs("train")
        size = round(self.preprocessing.size * CACHE_MARGIN)
        return dataset.cache(self.images, size, self.cache / "images.npy")

    def inputs(self, split: Split, preprocessing: Preprocessing | None = None) -> np.ndarray:
        """The images of a split, cropped by the evaluation transform, uint8 [N, 3, S, S], decoded once.

        Args:
            preprocessing: to use instead of the student's.
        """
        images = self.images if split == "train" else self.held_out
        p = preprocessing or self.preprocessing
        key = [images.fingerprint(), p.size, p.crop_pct, p.interpolation, p.crop_mode]
        return embed.pixels(images, p, self.cache / f"inputs-{p.size}-{hash_of(key)}.npy")

    def beside(self, suffix: str, **changes: Any) -> "Run":
        """The run in the folder NAME-suffix, whose recipe has these ``changes``."""
        folder = self.folder.with_name(f"{self.folder.name}-{suffix}")
        run = begin(folder, replace(self.recipe, **changes), self.watch)
        run.suffix = f"-{suffix}"
        return run

    @cached_property
    def distilled(self) -> "Run | None":
        """The run whose adapter SwAV starts from, with ``distill+swav``."""
        if not self.recipe.distills_first:
            return None
        return self.beside("distilled", objective="distill", clusters=0)

    @property
    def cache(self) -> Path:
        """The cache folder shared by neighboring runs."""
        return self.folder.parent / "cache"

    def features(self, name: str, preprocessing: Preprocessing | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Features of the training and the held-out images, float32 [N, F], computed once and cached.

        Args:
            name: of a mask trained in this run, or ``frozen`` for the plain backbone.
            preprocessing: to use instead of the student's.
        """
        self._expect(1)
        path = self.folder / name / (f"features-{preprocessing.size}.safetensors" if preprocessing else FEATURES)
        if not path.exists():
            mask = None if name == "frozen" else self.mask(name, self.mask_from)
            train, test = (self.embedded(mask, split, preprocessing) for split in SPLITS)
            write_tensors(path, {"train": torch.from_numpy(train), "test": torch.from_numpy(test)})
        tensors = load_file(path)
        return tensors["train"].numpy(), tensors["test"].numpy()

    def blocks(self) -> tuple[np.ndarray, np.ndarray]:
        """Features of both sets under dispatcher and experts, float32 [K + 1, N, F] each, computed once and cached."""
        if not self.recipe.clusters:
            train, test = self.features("dispatcher")
            return train[None], test[None]
        self._expect(1 + len(self.experts))
        path = self.folder / "experts" / FEATURES
        if not path.exists():
            both: dict[str, Tensor] = {}
            for split in SPLITS:
                inputs = embed.normalized(self.inputs(split), self.preprocessing)
                blocks = embed.blocks(self.executor, [self.dispatcher, *self.experts], inputs)
                both[split] = torch.from_numpy(blocks[1:])
            write_tensors(path, both)
        experts = load_file(path)
        train, test = self.features("dispatcher")
        return (
            np.concatenate([train[None], experts["train"].numpy()]),
            np.concatenate([test[None], experts["test"].numpy()]),
        )

    def _expect(self, masks: int) -> None:
        """Check that features of both sets under this many masks fit into memory twice: in parts and joined."""
        images = len(self.images) + len(self.held_out)
        expect(2 * 4 * masks * images * self.backbone.features, f"the features of {images} images under {masks} masks")

    def embedded(self, mask: Mask | None, split: Split, preprocessing: Preprocessing | None = None) -> np.ndarray:
        """Features of a split under a mask, or of the plain backbone: float32 [N, F]."""
        inputs = embed.normalized(self.inputs(split, preprocessing), preprocessing or self.preprocessing)
        return embed.blocks(self.executor, [mask], inputs)[0] if mask else embed.frozen(self.executor, inputs)

    @cached_property
    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the training and validation images, int64 each; without labels there are no validation images."""
        if not self.recipe.labels or self.images.labels is None:
            return np.arange(len(self.images)), np.arange(0)
        return split_validation(self.images.labels, self.recipe.seed)

    @property
    def steps(self) -> int:
        """Steps of the dispatcher: the recipe's, or by the number of images."""
        if self.planned or self.recipe.steps >= 0:
            return self.planned or self.recipe.steps
        if self.recipe.kind == "swav":
            return SWAV_STEPS
        by_size = round(STEPS[self.recipe.kind] * (len(self.images) / STEPS_IMAGES) ** 0.5)
        return min(MOST_STEPS, max(LEAST_STEPS[self.recipe.kind], by_size))

    @property
    def expert_steps(self) -> int:
        """Steps of each expert: the recipe's with SwAV; else the experts share those of one mask."""
        return self.recipe.expert_steps if self.recipe.kind == "swav" else max(1, self.steps // self.recipe.clusters)

    @cached_property
    def views(self) -> list[np.ndarray] | None:
        """Stored trunk features, if the recipe uses them; shared by all runs in the same folder."""
        r, p = self.recipe, self.preprocessing
        if not r.draws:
            return None
        if self.mask_from != self.expert_from:
            raise CascadeError("--draws stores the features before --mask-from: leave --expert-from out, or --draws")
        crops, most = r.crops(p.size), p.size // SHIFT
        how = {"swav": crops, "labels": most, "distill": "mirrored"}[r.kind]
        draws = 2 if r.kind == "distill" else r.draws
        key = [self.backbone.fingerprint, self.images.fingerprint(), self.mask_from, draws, how, p.to_json()]
        path = self.cache / f"views-{hash_of(key)}"
        self.watch.say(f"storing trunk features of {draws} draws of {len(self.images)} images")
        some = self.executor, self.mask_from, self.pixels, p
        match r.kind:
            case "swav":
                return feature_cache.store(*some, crops, draws, path)
            case "labels":
                return [feature_cache.store_shifted(*some, most, draws, path)]
            case "distill":
                return [feature_cache.store_mirrored(*some, path)]

    @property
    def mask_from(self) -> int:
        return self._stage("--mask-from", self.recipe.mask_from)

    @property
    def expert_from(self) -> int:
        first = self._stage("--expert-from", self.recipe.expert_from) if self.recipe.expert_from else self.mask_from
        if first < self.mask_from:
            raise CascadeError(
                "--expert-from is before --mask-from: experts must start at the dispatcher's first stage or later"
            )
        return first

    def _stage(self, option: str, name: str) -> int:
        """The stage of an option; there must be something to mask from there on."""
        first = self.backbone.stage(name)
        if self.backbone.offset(first) == self.backbone.weights.numel():
            raise CascadeError(f"{self.recipe.backbone} has nothing to mask from {name} on: choose an earlier {option}")
        return first

    @property
    def mask_to(self) -> int:
        """First stage after ``mask_from`` that has no scores."""
        return self.backbone.stage(self.recipe.mask_to) if self.recipe.mask_to else len(self.backbone.stages)

    @property
    def share(self) -> float | None:
        return self.recipe.share or None

    @cached_property
    def free(self) -> dict[str, Tensor] | None:
        """The weights that may be switched off; None for all."""
        r = self.recipe
        return None if r.select == "all" else select(self.backbone, self.mask_from, r.select, r.select_share, r.seed)

    def masked(self, start: int, below: Mask | None = None) -> MaskedModel:
        """A new model to train an adapter with, from stage ``start`` on, according to the recipe."""
        r = self.recipe
        if r.adapt == "delta":
            return tune_backbone(self.backbone, start, train_norms=r.train_norms, amp=r.amp, stop=self.mask_to)
        return mask_backbone(
            self.backbone,
            start,
            initial=r.initial,
            threshold=r.threshold,
            train_norms=r.train_norms,
            below=below,
            stop=self.mask_to,
            share=self.share,
            free=self.free,
            amp=r.amp,
            adapt=r.adapt,  # type: ignore[arg-type]  # auto is resolved by the recipe, delta above
        )

    @cached_property
    def dispatcher(self) -> Mask:
        return self.mask("dispatcher", self.mask_from)

    @property
    def experts(self) -> tuple[Mask, ...]:
        return tuple(self.mask(f"expert-{k}", self.expert_from) for k in range(self.recipe.clusters))

    @cached_property
    def clusters(self) -> dict[str, Tensor]:
        """Router, out-of-domain score and the cluster of each training image, from the clusters stage."""
        path = self.folder / CLUSTERS
        if not path.exists():
            raise CascadeError(f"{path} does not exist yet: run python -m training.clusters first")
        return load_file(path)

    def mask(self, name: str, start: int) -> Mask:
        """A fully trained mask or delta of this run."""
        if self.recipe.adapt == "delta":
            return self._delta(name)
        trained = self.trained(name)
        scores, norms, channels = (strip_prefix(trained, f"{kind}.") for kind in ("scores", "norms", "channels"))
        return to_mask(
            name, self.backbone, start, scores, norms, self.recipe.threshold, self.share, self.free, channels
        )

    def _delta(self, name: str) -> Mask:
        path = self.folder / name / DELTA
        if not path.exists():
            raise CascadeError(f"{path} does not exist yet: train {name} first")
        stored = load_file(path)
        parts = [strip_prefix(stored, f"{part}.") for part in ("norms", "channels", "deltas")]
        return Mask(name, int(stored["start"]), stored["bits"], *parts)

    def trained(self, name: str) -> dict[str, Tensor]:
        """The final tensors of the training ``name``."""
        return trained(self.folder / name)


def trained(folder: Path) -> dict[str, Tensor]:
    """The final tensors of the training in ``folder``."""
    path = folder / DONE
    if not path.exists():
        raise CascadeError(f"{path} does not exist yet: train {folder.name} first")
    return load_file(path)


def split_validation(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split rows for training and validation, int64 each, stratified; classes of two or more images can be in both."""
    wanted = int(min(max(LEAST_VALIDATION, VALIDATION * len(labels)), MOST_VALIDATION, len(labels) // 5))
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # by class, shuffled within each
    counts = np.bincount(labels)
    order = order[counts[labels[order]] > 1]
    chosen = order[np.linspace(0, len(order), wanted, endpoint=False).astype(int)] if wanted else order[:0]
    return np.setdiff1d(np.arange(len(labels)), chosen), np.sort(chosen)


def begin(folder: Path, recipe: Recipe, watch: Watch) -> Run:
    """Start a run, or resume it if the recipe is the same."""
    with distributed.first():
        recipe.save(folder)
    run = Run(folder, recipe, watch)
    if distributed.world() > 1:
        with distributed.first():  # what is decoded and stored, is so once
            _ = run.images, run.held_out, run.pixels, run.views
    return run


def resume(folder: Path, watch: Watch) -> Run:
    """Open a run that an earlier stage has started."""
    return Run(folder, Recipe.load(folder), watch)


def device() -> str:
    """CUDA if there is a GPU, one per process; the only place where training chooses a device."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def hash_of(key: Any) -> str:
    """A short hash of plain types, for naming cache files."""
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]


def write_json(path: Path, value: Any) -> None:
    """A file that is whole or not there; of several processes the first one writes it."""
    if distributed.rank():
        return
    with atomic.file(path, alone=True) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Read a stage's JSON file."""
    return json.loads(path.read_text())


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """A file that is whole or not there; of several processes the first one writes it."""
    if distributed.rank():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic.file(path, alone=True) as temporary:
        temporary.write_bytes(save({n: t.detach().cpu().contiguous() for n, t in tensors.items()}))
