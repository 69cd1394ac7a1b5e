"""The files of a bundle: what is in them, and how to change it."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from cascade.bundle import thumbnails
from cascade.bundle.format import Bundle, BundleError, read
from cascade.bundle.map import Map
from cascade.bundle.schema import BackboneCard, Card, MaskCard
from cascade.model.fusion import Fusion
from cascade.model.masks import Mask, pack
from cascade.model.preprocessing import Preprocessing
from cascade.model.router import Calibration
from tests.helpers.bundles import handmade

PARTS = ("masks", "router", "fusion", "heads", "thumbnails", "map")


FILES = ("cascade.json", "SHA256SUMS", *(f"{part}.safetensors" for part in PARTS))


def whole(cifar: list[Image.Image], **changes: Any) -> Bundle:
    """A bundle with every part."""
    bundle = handmade(cifar, norms=True, **changes)
    places = Map(torch.linspace(0, 1, 40).view(20, 2).half(), (torch.arange(20) % 2).to(torch.int16))
    return replace(bundle, thumbnails=thumbnails.make(cifar[:20]), map=places)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def equal(a: Any, b: Any) -> bool:
    """Deep equality of dataclasses of tensors, apart from the card's file sizes and the digest of a bundle's files."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.equal(b)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, Card):
        return a.model_copy(update={"bytes": {}}) == b.model_copy(update={"bytes": {}})
    if is_dataclass(a):
        return type(a) is type(b) and all(
            equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a) if f.name != "digest"
        )
    return bool(a == b)


def every_tensor(part: Any) -> list[Tensor]:
    if isinstance(part, Tensor):
        return [part]
    if isinstance(part, Mapping):
        return [t for value in part.values() for t in every_tensor(value)]
    if isinstance(part, tuple):
        return [t for value in part for t in every_tensor(value)]
    return [t for f in fields(part) for t in every_tensor(getattr(part, f.name))] if is_dataclass(part) else []


def seal(folder: Path) -> None:
    """Write checksums that are right for whatever is there."""
    names = sorted(p.name for p in folder.iterdir() if p.name != "SHA256SUMS")
    sums = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / "SHA256SUMS").write_text("".join(sums))


def edit_card(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    card = json.loads((folder / "cascade.json").read_text())
    change(card)
    (folder / "cascade.json").write_text(json.dumps(card))
    seal(folder)


def edit_tensors(folder: Path, part: str, change: Callable[[dict[str, Tensor]], object]) -> None:
    file = folder / f"{part}.safetensors"
    tensors = safetensors.torch.load(file.read_bytes())
    change(tensors)
    file.write_bytes(safetensors.torch.save(tensors))
    seal(folder)


def refusal(folder: Path) -> str:
    with pytest.raises(BundleError) as error:
        read(folder)
    text = str(error.value)
    assert "\n" not in text and str(folder) in text, text
    return text


def tiny() -> Bundle:
    """Ten maskable weights, written out."""
    bits = torch.tensor([True, False, False, True, False, False, False, False, True, True])
    preprocessing = Preprocessing(32, 1.0, "bicubic", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    return Bundle(
        name="tiny",
        version="1",
        card=Card(
            format=1,
            backbone=BackboneCard(
                name="net", source="random:0", fingerprint="0" * 64, features=2, stages=["a", "b"], maskable=12
            ),
            preprocessing=preprocessing.to_json(),
            masks=[MaskCard(name="dispatcher", start=1, weights=10, density=0.4)],
            mode="dispatcher",
            dim=1,
        ),
        preprocessing=preprocessing,
        dispatcher=Mask("dispatcher", 1, pack(bits), {"bn.running_mean": torch.tensor([1.0])}),
        experts=(),
        router=None,
        calibration=Calibration(),
        ood=None,
        fusions={"dispatcher": Fusion(torch.tensor([[[1.0], [-2.0]]]).half(), torch.tensor([0.5]))},
    )
