"""Images that fit no bundle as training data: ``cascade train --from-unknown FOLDER --out model_store/new/1``.

The folder is that of ``cascade serve --keep-unknown``, or its downloaded archive, or any other folder of images. Images
that by now fit a bundle in the store of ``--out`` are left out, so that the same folder can give one bundle after
another. Backbone and input size are those of the server's dispatch, so that it sends such images to the new bundle.
"""

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from cascade import atomic
from cascade.bundle.bundle import Bundle, BundleError
from cascade.bundle.store import Store
from cascade.engine.dispatch_table import DispatchTable, Target
from cascade.engine.loaded import number
from cascade.engine.unknown import Origin, origin_of
from cascade.errors import CascadeError
from cascade.model.decoding import ImageError, load
from cascade.model.domain import UNKNOWN
from cascade.model.preprocessing import Preprocessing
from training import distributed
from training.cli import Watch
from training.data.dataset import HOLD_OUT
from training.data.scan import walk
from training.recipe import Recipe
from training.run import FEWEST

LEAST = round(FEWEST / (1 - HOLD_OUT))  # images
SETTINGS = "origin.json"

log = logging.getLogger(__name__)


def recipe_of(recipe: Recipe, folder: Path, out: Path, run: Path, watch: Watch) -> Recipe:
    """Copy the images next to the run, once, and complete the recipe by what the server knew about them.

    Explicit options for backbone, weights and input size take precedence.

    Args:
        out: of the bundle; images that fit another bundle in its store are left out.
        run: folder of the run. The copies are in ``<run>-unknown``, since the server may evict images meanwhile.

    Raises:
        CascadeError: there is no such folder, too few images are left, or the recipe needs labels.
    """
    if recipe.labels:
        raise CascadeError("images from --from-unknown have no labels: sort them into class folders, and name that one")
    copies = run.with_name(f"{run.name}-unknown")
    with distributed.first():
        if not copies.exists():
            _copy(folder, out, copies, watch)
    watch.say(f"images that fit no bundle: those in {copies / 'images'}")
    recipe = replace(recipe, data=str(copies / "images"))
    origin = json.loads((copies / SETTINGS).read_text())
    if not origin:
        return recipe
    default = Recipe("")
    if (recipe.backbone, recipe.source) == (default.backbone, default.source):
        recipe = replace(recipe, backbone=origin["backbone"], source=origin["source"])
    shape = Preprocessing.from_json(origin["preprocessing"])
    return replace(recipe, size=recipe.size or shape.size, crop_pct=recipe.crop_pct or shape.crop_pct)


def _copy(folder: Path, out: Path, copies: Path, watch: Watch) -> None:
    """Copy the images that fit no bundle, and the settings of most of them."""
    files: dict[str, bytes] = {}
    origins: dict[str, Origin | None] = {}
    for name in walk(_checked(folder))[0]:
        try:
            files[name] = load(folder / name)
            origins[name] = origin_of(files[name])
        except (ImageError, OSError) as error:  # evicted meanwhile, or damaged
            files.pop(name, None)
            log.warning("%s is left out: %s", name, error)
    known = _fitting(out.absolute().parents[1], [(name, origin) for name, origin in origins.items() if origin])
    left = [name for name in files if name not in known]
    if known:
        most = ", ".join(f"{bundle} ({count})" for bundle, count in Counter(known.values()).most_common(5))
        watch.say(f"{len(known)} of {len(files)} images are left out, as they fit a bundle by now: {most}")
    if len(left) < LEAST:
        raise CascadeError(f"{len(left)} images in {folder} fit no bundle, too few for a new one: wait for {LEAST}")
    settings = Counter(_settings(origins[name]) for name in left).most_common(1)[0][0]
    copies.parent.mkdir(parents=True, exist_ok=True)
    with atomic.folder(copies) as beside:
        for name in left:
            target = beside / "images" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(files[name])
        (beside / SETTINGS).write_text(settings)


def _checked(folder: Path) -> Path:
    if not folder.is_dir():
        raise CascadeError(f"{folder} is not a folder: name that of --keep-unknown, or the unpacked archive")
    return folder


def _settings(origin: Origin | None) -> str:
    if origin is None:
        return "null"
    facts = {"backbone": origin.backbone, "source": origin.source, "preprocessing": origin.preprocessing}
    return json.dumps(facts, sort_keys=True)


def _fitting(store: Path, images: Sequence[tuple[str, Origin]]) -> dict[str, str]:
    """The images that fit a bundle of the store, each with the nearest one, by their kept embeddings."""
    found: dict[str, str] = {}
    for space in DispatchTable.of(map(Target.of, _latest(store))).spaces if images else ():
        mine = [
            (name, origin.embedding)
            for name, origin in images
            if (origin.fingerprint, origin.stage) == (space.fingerprint, space.stage)
            and origin.preprocessing == space.preprocessing.to_json()
            and len(origin.embedding) == len(space.domains.metric)
        ]
        if not mine:
            continue
        features = torch.stack([torch.from_numpy(embedding.astype("f4")) for _, embedding in mine])
        distance = space.domains.distance(features, space.domains.scores(features))
        least, nearest = space.domains.strangeness(distance).min(dim=1)
        for (name, _), strange, column in zip(mine, least.tolist(), nearest.tolist(), strict=True):
            if strange <= UNKNOWN:
                found[name] = space.targets[column].name
    return found


def _latest(folder: Path) -> list[Bundle]:
    """The latest valid version of every bundle in a store."""
    if not folder.is_dir():
        return []
    store, found = Store(folder), dict[str, Bundle]()
    for name, version in sorted(store.look(), key=lambda identity: number(identity[1])):
        try:
            found[name] = store.read(name, version)[0]
        except BundleError as error:
            log.warning("%s", error)
    return [*found.values()]
