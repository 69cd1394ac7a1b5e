"""The folder of a training run: what each stage leaves there and the next one reads.

runs/cache/              decoded images and stored trunk features, shared by neighboring runs
runs/<name>/recipe.json
            train.json  test.json           how many images there were, and which could not be read
            dispatcher/  checkpoint.safetensors -> done.safetensors, curve.jsonl
            clusters.safetensors  clusters.json
            expert-0/ .. expert-K/
            equal-steps/  zero-rate/        controls, where they were asked for
            evaluation.json
"""

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
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
from training import distributed
from training.checkpoint import DONE
from training.cli import Watch
from training.data import dataset, feature_cache
from training.data.dataset import Images
from training.masking import MaskedModel, mask_backbone, select, to_mask
from training.recipe import Recipe

CLUSTERS = "clusters.safetensors"
CACHE_MARGIN = 1.15  # training images are kept a little larger than the network's input, for the crops
FEWEST = 16  # images that a mask is trained on


@dataclass
class Run:
    """An open run: its folder and recipe, and, made when first used, its images and backbone."""

    folder: Path
    recipe: Recipe
    watch: Watch

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
            raise CascadeError(f"{len(images)} test image is too few to calibrate with: there must be two at least")
        return self._known("test", images)

    def _known(self, split: str, images: Images) -> Images:
        """They are the same whenever the run goes on; a file in its folder names those that were left out."""
        about = {"images": len(images), "fingerprint": images.fingerprint(), "broken": dict(images.broken)}
        path = self.folder / f"{split}.json"
        known = read_json(path) if path.exists() else None
        if known and known["fingerprint"] != about["fingerprint"]:
            raise CascadeError(
                f"the {split} images of {self.recipe.data} are not those that {self.folder} was begun with:"
                " put them back, or choose another --run folder"
            )
        if known != about:  # not again where others, experts in training beside each other say, may do the same
            write_json(path, about)
        return images

    @cached_property
    def pixels(self) -> np.ndarray:
        """The training cache, uint8 [N, 3, S, S]."""
        size = round(self.preprocessing.size * CACHE_MARGIN)
        return dataset.cache(self.images, size, self.folder.parent / "cache" / "images.npy")

    @cached_property
    def views(self) -> list[np.ndarray] | None:
        """Stored trunk features, where the recipe wants them; shared by all runs that lie side by side."""
        r, p = self.recipe, self.preprocessing
        if not r.draws:
            return None
        if self.mask_from != self.expert_from:
            raise CascadeError("--draws stores the features before --mask-from: leave --expert-from out, or --draws")
        crops = r.crops(p.size)
        key = [
            self.backbone.fingerprint,
            self.images.fingerprint(),
            self.mask_from,
            r.draws,
            crops,
            p.to_json(),
        ]
        name = f"views-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}"
        path = self.folder.parent / "cache" / name
        self.watch.say(f"storing trunk features of {r.draws} draws of {len(self.images)} images")
        return feature_cache.store(self.executor, self.mask_from, self.pixels, p, crops, r.draws, path)

    @property
    def mask_from(self) -> int:
        return self._stage("--mask-from", self.recipe.mask_from)

    @property
    def expert_from(self) -> int:
        first = self._stage("--expert-from", self.recipe.expert_from) if self.recipe.expert_from else self.mask_from
        if first < self.mask_from:
            raise CascadeError(
                "--expert-from lies before --mask-from: experts start where the dispatcher does, or later"
            )
        return first

    def _stage(self, option: str, name: str) -> int:
        """A stage from which on there is something to mask."""
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
        """The weights that may be switched off, where not all may."""
        r = self.recipe
        return None if r.select == "all" else select(self.backbone, self.mask_from, r.select, r.select_share, r.seed)

    def masked(self, start: int, below: Mask | None = None) -> MaskedModel:
        """A fresh model to learn a mask with, from stage ``start`` on, as the recipe says."""
        r = self.recipe
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
        )

    @cached_property
    def dispatcher(self) -> Mask:
        return self.mask("dispatcher", self.mask_from)

    @property
    def experts(self) -> tuple[Mask, ...]:
        return tuple(self.mask(f"expert-{k}", self.expert_from) for k in range(self.recipe.clusters))

    @cached_property
    def clusters(self) -> dict[str, Tensor]:
        """Router, out-of-domain score and the cluster of each training image, as the clusters' stage left them."""
        path = self.folder / CLUSTERS
        if not path.exists():
            raise CascadeError(f"{path} is not there yet: run python -m training.clusters first")
        return load_file(path)

    def mask(self, name: str, start: int) -> Mask:
        """A mask that was trained to its end in this run."""
        trained = self.trained(name)
        scores, norms = strip_prefix(trained, "scores."), strip_prefix(trained, "norms.")
        return to_mask(name, self.backbone, start, scores, norms, self.recipe.threshold, self.share, self.free)

    def trained(self, name: str) -> dict[str, Tensor]:
        """The tensors that the training of ``name`` ended with."""
        return trained(self.folder / name)


def trained(folder: Path) -> dict[str, Tensor]:
    """The tensors that the training in ``folder`` ended with."""
    path = folder / DONE
    if not path.exists():
        raise CascadeError(f"{path} is not there yet: train {folder.name} first")
    return load_file(path)


def begin(folder: Path, recipe: Recipe, watch: Watch) -> Run:
    """Start a run, or go on with it where the recipe is the same."""
    with distributed.first():
        recipe.save(folder)
    run = Run(folder, recipe, watch)
    if distributed.world() > 1:
        with distributed.first():  # what is decoded and stored, is so once
            _ = run.images, run.held_out, run.pixels, run.views
    return run


def resume(folder: Path, watch: Watch) -> Run:
    """A run that another stage has begun."""
    return Run(folder, Recipe.load(folder), watch)


def device() -> str:
    """CUDA where there is a card, each process its own; the only place that training asks."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def write_json(path: Path, value: Any) -> None:
    """A file that is whole or not there; of several processes the first one writes it."""
    if distributed.rank():
        return
    with atomic.file(path, alone=True) as beside:
        beside.write_text(json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """What a stage has left as JSON."""
    return json.loads(path.read_text())


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """A file that is whole or not there; of several processes the first one writes it."""
    if distributed.rank():
        return
    with atomic.file(path, alone=True) as beside:
        save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, beside)
