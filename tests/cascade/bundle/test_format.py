"""The bundle on disk: the same bytes for the same inputs, every change noticed, all of it or nothing."""

import errno
import hashlib
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import zstandard
from PIL import Image
from torch import Tensor

from cascade.bundle import format as formats
from cascade.bundle import thumbnails
from cascade.bundle.files import NAME
from cascade.bundle.format import Bundle, BundleError, check, digest, read, write
from cascade.bundle.schema import BackboneCard, Card, MaskCard, RouterCard
from cascade.bundle.store import discover
from cascade.bundle.thumbnails import Thumbnails
from cascade.errors import OutOfMemory
from cascade.model import backbone as backbones
from cascade.model.backbone import Backbone
from cascade.model.fusion import Fusion
from cascade.model.heads import Bank, Linear
from cascade.model.masks import Mask, density, difference, pack, unpack
from cascade.model.out_of_domain import OutOfDomain
from cascade.model.preprocessing import Preprocessing
from cascade.model.router import KINDS, Calibration
from tests.helpers.bundles import handmade
from tests.helpers.paths import ROOT

DOCUMENT = ROOT / "docs" / "bundle-format.md"
PARTS = ("masks", "router", "fusion", "heads", "thumbnails")
FILES = ("cascade.json", "SHA256SUMS", *(f"{part}.safetensors" for part in PARTS))


def whole(cifar: list[Image.Image], **changes: Any) -> Bundle:
    """A bundle with every part."""
    return replace(handmade(cifar, norms=True, **changes), thumbnails=thumbnails.make(cifar[:20]))


@pytest.fixture(scope="module")
def small(cifar: list[Image.Image]) -> Bundle:
    return whole(cifar[:48], router="prototypes")


@pytest.fixture
def written(small: Bundle, tmp_path: Path) -> Path:
    return write(small, tmp_path / "hand" / "1")


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


# --- what is written is what was meant


@pytest.mark.parametrize("compress", [True, False], ids=["zstd", "plain"])
def test_roundtrip(small: Bundle, tmp_path: Path, compress: bool) -> None:
    found = read(write(small, tmp_path / "hand" / "1", compress=compress))
    assert equal(found, small)
    assert found.masks[1].norms, "statistics have to travel, too"
    assert found.card.bytes == {p.name: p.stat().st_size for p in (tmp_path / "hand" / "1").glob("*.safetensors")}


@pytest.mark.parametrize("router", ["prototypes", "gmm", "centroid"])
@pytest.mark.parametrize("slots", ["one", "padded"])
def test_roundtrip_of_every_kind(cifar: list[Image.Image], tmp_path: Path, router: str, slots: str) -> None:
    bundle = handmade(cifar[:30], router=router, slots=slots)
    assert equal(read(write(bundle, tmp_path / "hand" / "1")), bundle)


def test_a_single_mask_is_a_bundle(cifar: list[Image.Image], tmp_path: Path) -> None:
    bundle = replace(handmade(cifar[:30], experts=0), linear={}, banks={}, ood=None)
    path = write(bundle, tmp_path / "single" / "1")
    assert contents(path).keys() == {"cascade.json", "SHA256SUMS", "masks.safetensors", "fusion.safetensors"}
    assert equal(read(path), replace(bundle, name="single"))


def test_the_real_bundle_reads_and_writes_the_same_bytes(bundle_path: Path, tmp_path: Path) -> None:
    found = read(bundle_path)
    assert (found.name, found.version) == ("small", "1")
    again = write(found, tmp_path / "copy" / "7")
    assert contents(again) == contents(bundle_path)
    copied = read(again)
    assert (copied.name, copied.version) == ("copy", "7"), "the folder names the bundle"


def test_the_real_card_says_what_the_masks_are(bundle_path: Path) -> None:
    bundle = read(bundle_path)
    backbone = backbones.load(bundle.card.backbone.name, bundle.card.backbone.source)
    check(bundle, backbone)
    assert len(bundle.experts) == 3
    for mask, card in zip(bundle.masks, bundle.card.masks, strict=True):
        assert card.density == pytest.approx(density(backbone, mask), abs=1e-4)
        assert card.differs_from_dispatcher == pytest.approx(difference(mask, bundle.dispatcher, backbone), abs=1e-4)
        assert 0.05 < card.density < 1


def test_same_inputs_same_bytes(cifar: list[Image.Image], tmp_path: Path) -> None:
    a, b = (write(whole(cifar[:30]), tmp_path / name / "1") for name in ("a", "b"))
    assert contents(a) == contents(b)
    assert set(contents(a)) == set(FILES)


def test_no_paths_no_times(bundle_path: Path, tmp_path: Path) -> None:
    card = (bundle_path / "cascade.json").read_text()
    for raw in contents(bundle_path).values():
        for here in (str(bundle_path.parents[2]), str(tmp_path.parent), str(Path.home()) + "/", os.getcwd()):
            assert here.encode() not in raw
    assert not re.search(r'"[^"]*(?:time|date|host|user|second|duration)[^"]*":', card)
    assert not re.search(r'": "(?:/|~|[A-Z]:\\)', card)
    assert not re.search(r"\b20\d\d-\d\d-\d\d\b|\b1[6-9]\d{8}\b", card)


def test_plain_and_zstd_hold_the_same_bits(small: Bundle, tmp_path: Path) -> None:
    plain = write(small, tmp_path / "plain" / "1", compress=False)
    packed = write(small, tmp_path / "zstd" / "1")
    assert equal(read(plain).dispatcher, read(packed).dispatcher)
    names = {p: set(safetensors.torch.load((p / "masks.safetensors").read_bytes())) for p in (plain, packed)}
    assert {"dispatcher.bits", "expert-1.bits"} <= names[plain]
    assert {"dispatcher.bits.zst", "expert-1.bits.zst"} <= names[packed]
    assert (packed / "masks.safetensors").stat().st_size < (plain / "masks.safetensors").stat().st_size


def test_all_bytes_are_counted(small: Bundle) -> None:
    indices = sum(4 * bank.embeddings.numel() for bank in small.banks.values())  # FAISS keeps rows in float32
    assert small.bytes() == sum(t.nbytes for t in every_tensor(small)) + indices
    assert equal(small.to("cpu"), small)


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


def test_golden_bytes(tmp_path: Path) -> None:
    """The format may not change unseen: a change of these bytes is a new format version."""
    path = write(tiny(), tmp_path / "tiny" / "1", compress=False)
    header = (
        b'{"dispatcher.norms.bn.running_mean":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"dispatcher.bits":{"dtype":"U8","shape":[2],"data_offsets":[4,6]}}'
    )
    header += b" " * (-len(header) % 8)
    stored = struct.pack("<Q", len(header)) + header + bytes.fromhex("0000803f") + bytes([0b00001001, 0b00000011])
    assert (path / "masks.safetensors").read_bytes() == stored
    assert (path / "SHA256SUMS").read_text() == (
        "ee436a24000d7577c85609638e89d91e0cfa15b003efcc4d036ab7e24499733f  cascade.json\n"
        "43102f86988944024487c485d40aab2be7e2f92fea647f12c5174568fb45b7b2  fusion.safetensors\n"
        "7899655dda56276359bdfd238a4dba9484634277132d5a59dcde4cc1a305c6b0  masks.safetensors\n"
    )
    assert equal(read(path), tiny())


# --- whatever was changed is noticed


def test_every_flipped_byte_is_noticed(bundle_path: Path, tmp_path: Path, generator: np.random.Generator) -> None:
    copy = tmp_path / "small" / "1"
    shutil.copytree(bundle_path, copy)
    read(copy)
    for name in FILES:
        file = copy / name
        raw = file.read_bytes()
        ends = [0, 1, 7, 8, len(raw) - 2, len(raw) - 1]
        for at in {*ends, *generator.integers(len(raw), size=50).tolist()}:
            changed = bytearray(raw)
            changed[at] ^= 1 << int(generator.integers(8))
            file.write_bytes(changed)
            with pytest.raises(BundleError, match=name if name != "SHA256SUMS" else None):
                read(copy)
        file.write_bytes(raw)
    read(copy)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0, 0.5, -1])
def test_truncated(written: Path, name: str, keep: float) -> None:
    raw = (written / name).read_bytes()
    (written / name).write_bytes(raw[: int(len(raw) * keep) if keep >= 0 else -1])
    assert name in refusal(written)


@pytest.mark.parametrize("name", FILES)
def test_missing_file(written: Path, name: str) -> None:
    (written / name).unlink()
    assert name in refusal(written)


def test_extra_file(written: Path) -> None:
    (written / "notes.txt").write_text("mine")
    assert "(notes.txt); copy the bundle again, whole" in refusal(written)


@pytest.mark.parametrize("kind", ["folder", "pipe", "dangling"])
def test_what_is_no_file(written: Path, kind: str) -> None:
    file = written / "heads.safetensors"
    file.unlink()
    match kind:
        case "folder":
            file.mkdir()
        case "pipe":
            os.mkfifo(file)
        case "dangling":
            file.symlink_to("nowhere")
    assert "heads.safetensors is not a file" in refusal(written)


def test_no_bundle(tmp_path: Path) -> None:
    assert "cascade.json is missing; a bundle is a folder <name>/<version>" in refusal(tmp_path)
    assert "no bundle at" in refusal(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    assert "no bundle at" in refusal(tmp_path / "file")


def test_read_error_is_one_line(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Path) -> bytes:
        raise OSError(errno.EIO, "Input/output error", str(self))

    monkeypatch.setattr(Path, "read_bytes", fail)
    assert "Input/output error" in refusal(written)


# --- right checksums, wrong contents

CARDS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "format 3": (lambda c: c.update(format=3), "format 3, this Cascade reads 1 to 2"),
    "a later format": (lambda c: c.update(format=3, novelty=[1]), "format 3, this Cascade reads 1 to 2"),
    "format 0": (lambda c: c.update(format=0), "format 0, this Cascade reads 1 to 2"),
    "no format": (lambda c: c.pop("format"), "format: Field required"),
    "format in words": (lambda c: c.update(format="one"), "format: "),
    "unknown field": (lambda c: c.update(novelty=1), "novelty: Extra inputs"),
    "no backbone": (lambda c: c.pop("backbone"), "backbone: Field required"),
    "fingerprint": (lambda c: c["backbone"].update(fingerprint="abc"), "backbone.fingerprint: "),
    "no masks": (lambda c: c.update(masks=[]), "masks: "),
    "mode": (lambda c: c.update(mode="both"), "mode: "),
    "preprocessing": (lambda c: c["preprocessing"].update(std=[0, 0, 0]), "std above 0"),
    "less preprocessing": (lambda c: c["preprocessing"].pop("mean"), "preprocessing: 'mean'"),
    "more weights": (lambda c: c["masks"][0].update(weights=c["masks"][0]["weights"] + 8), "more weights than"),
    "fewer weights": (lambda c: c["masks"][0].update(weights=c["masks"][0]["weights"] - 8), "expands to"),
    "a later start": (lambda c: c["masks"][1].update(start=5), "a mask starts after the last stage"),
    "expert first": (lambda c: c["masks"][0].update(start=1), "an expert starts before the dispatcher"),
    "two starts": (lambda c: c["masks"][1].update(start=1), "experts start at different stages"),
    "names": (lambda c: c["masks"].reverse(), "its masks should be dispatcher expert-0 expert-1"),
    "unknown router": (lambda c: c["router"].update(kind="oracle"), "unknown router oracle"),
    "another router": (lambda c: c["router"].update(kind="gmm"), "do not fit together"),
    "no router": (lambda c: c.update(router=None), "experts need a router"),
    "shares": (lambda c: c["router"].update(shares=[1.0]), "one share for each expert"),
    "fewer masks": (lambda c: c["masks"].pop(), "one share for each expert"),
    "classes": (
        lambda c: c["classes"].pop(),
        "head dispatcher: weight is float32 [3, 8], should be float32/float16 classes",
    ),
    "dim": (lambda c: c.update(dim=9), "fusion dispatcher: weight is float16 [1, 96, 8], should be float16 slots F"),
    "features": (lambda c: c["backbone"].update(features=97), "router: head is float16 [16, 96], should be"),
}


@pytest.mark.parametrize("case", CARDS)
def test_card_that_does_not_fit(written: Path, case: str) -> None:
    change, expected = CARDS[case]
    edit_card(written, change)
    assert expected in refusal(written)


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b'{"format": 1}', b'{"format": NaN}', b"\xff\xfe", b"\x00" * 64])
def test_card_that_is_none(written: Path, raw: bytes) -> None:
    (written / "cascade.json").write_bytes(raw)
    seal(written)
    assert "this is not a bundle of format 1 to 2" in refusal(written)


def bump(name: str, **kwargs: Any) -> Callable[[dict[str, Tensor]], object]:
    """One more row in a tensor."""
    return lambda t: t.update({name: torch.cat([t[name], t[name][:1]], **kwargs)})


def cast(name: str, dtype: torch.dtype) -> Callable[[dict[str, Tensor]], object]:
    return lambda t: t.update({name: t[name].to(dtype)})


def noise() -> Image.Image:
    return Image.merge("RGB", [Image.effect_noise((128, 128), 99) for _ in range(3)])


def one_picture(picture: Callable[[], Image.Image]) -> Callable[[dict[str, Tensor]], object]:
    """Put this one in the place of all, as a PNG file."""

    def change(tensors: dict[str, Tensor]) -> None:
        picture().save(out := io.BytesIO(), "png")
        rows = len(tensors["thumbnails.offsets"])
        tensors["thumbnails.offsets"] = torch.arange(rows) * len(out.getvalue())
        tensors["thumbnails.data"] = torch.frombuffer(bytearray(out.getvalue() * (rows - 1)), dtype=torch.uint8)

    return change


TENSORS: dict[str, tuple[str, Callable[[dict[str, Tensor]], object], str]] = {
    "no dispatcher": ("masks", lambda t: t.pop("dispatcher.bits.zst"), "dispatcher.bits"),
    "no expert": ("masks", lambda t: t.pop("expert-1.bits.zst"), "expert-1.bits"),
    "garbage": (
        "masks",
        lambda t: t.update({"dispatcher.bits.zst": torch.zeros(9, dtype=torch.uint8)}),
        "fit together",
    ),
    "no frame": ("masks", lambda t: t.update({"dispatcher.bits.zst": torch.zeros(0, dtype=torch.uint8)}), "together"),
    "cut frame": ("masks", lambda t: t.update({"dispatcher.bits.zst": t["dispatcher.bits.zst"][:-9]}), "fit together"),
    "router mean": ("router", bump("router.prototypes"), "router: cluster is int64 [30], should be int64 C"),
    "router head": ("router", bump("router.head"), "router: bias is float16 [16], should be float16 P"),
    "router dtype": ("router", cast("router.cluster", torch.float32), "cluster is float32 [30], should be int64 C"),
    "router value": ("router", lambda t: t["router.cluster"].fill_(2), "one cluster for each expert"),
    "router count": ("router", lambda t: t["router.clusters"].fill_(3), "one cluster for each expert"),
    "router part": ("router", lambda t: t.pop("router.head"), "fit together"),
    "router novelty": ("router", lambda t: t.update({"router.new": torch.ones(1)}), "fit together"),
    "ood mean": ("router", bump("ood.mean"), "ood: mean is float32 [97], should be float32 F"),
    "ood variance": ("router", bump("ood.variance"), "ood: variance is float32"),
    "ood noise": ("router", bump("ood.noise"), "ood: noise is float32 [2], should be float32 1"),
    "ood flat": ("router", lambda t: t.update({"ood.basis": t["ood.basis"].flatten()}), "ood: basis is float16 ["),
    "ood short": ("router", lambda t: t.update({"ood.quantiles": t["ood.quantiles"][:1].clone()}), "two quantiles"),
    "slots": ("fusion", bump("unconditional.weight"), "fusion unconditional has 4 slots"),
    "conditional": (
        "fusion",
        lambda t: t.update({"conditional.weight": t["dispatcher.weight"].clone()}),
        "has 1 slots",
    ),
    "no default": ("fusion", lambda t: t.pop("conditional.weight"), "no fusion for its default mode conditional"),
    "fusion bias": ("fusion", lambda t: t.pop("dispatcher.bias"), "fit together"),
    "fusion dtype": ("fusion", cast("dispatcher.weight", torch.float32), "should be float16 slots F dim"),
    "head": ("heads", bump("dispatcher.linear.weight"), "head dispatcher: weight is float32 [4, 8]"),
    "bank rows": ("heads", bump("dispatcher.bank"), "bank dispatcher: embeddings is float16 [21, 8]"),
    "bank names": ("heads", lambda t: t["bank.names"].fill_(255), "fit together"),
    "no names": ("heads", lambda t: t.pop("bank.names"), "bank.names"),
    "thumbnails": ("thumbnails", lambda t: t.pop("thumbnails.offsets"), "fit together"),
    "picture rows": ("thumbnails", bump("thumbnails.offsets"), "offsets is int64 [22], should be int64 rows+1"),
    "picture dtype": ("thumbnails", cast("thumbnails.offsets", torch.float32), "should be int64 rows+1"),
    "picture bytes": ("thumbnails", cast("thumbnails.data", torch.int8), "data is int8"),
    "picture first": ("thumbnails", lambda t: t["thumbnails.offsets"][:1].fill_(1), "do not rise from 0 to"),
    "picture order": ("thumbnails", lambda t: t["thumbnails.offsets"][3:4].fill_(0), "do not rise from 0 to"),
    "picture end": ("thumbnails", lambda t: t["thumbnails.offsets"][-1:].add_(9), "do not rise from 0 to"),
    "picture before": ("thumbnails", lambda t: t["thumbnails.offsets"][1:2].fill_(-9), "do not rise from 0 to"),
    "no picture": ("thumbnails", lambda t: t["thumbnails.data"][:9].fill_(0), "row 0: this is not a JPEG, PNG or WebP"),
    "cut picture": ("thumbnails", lambda t: t["thumbnails.offsets"][1:2].sub_(99), "row 0: the image is truncated"),
    "large picture": ("thumbnails", one_picture(lambda: Image.new("RGB", (129, 8))), "row 0: the image is 129 x 8 pix"),
    "heavy picture": ("thumbnails", one_picture(noise), "the limit is 0.015625"),
    "bank labels": ("heads", lambda t: t["bank.labels"].fill_(97), "20 names and 1 labels"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit(written: Path, case: str) -> None:
    part, change, expected = TENSORS[case]
    edit_tensors(written, part, change)
    assert expected in refusal(written)


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("gmm", bump("router.precisions"), "router: precisions is float64 [3, 20, 20], should be float64 K d d"),
        ("gmm", bump("router.mean"), "router: mean is float64 [97], should be float64 F"),
        ("centroid", bump("router.centroids"), "router: centroids is float64 [3, 20], should be float64 K d"),
    ],
)
def test_other_routers_that_do_not_fit(
    cifar: list[Image.Image], tmp_path: Path, name: str, change: Callable[[dict[str, Tensor]], object], expected: str
) -> None:
    path = write(handmade(cifar[:30], router=name), tmp_path / "hand" / "1")
    edit_tensors(path, "router", change)
    assert expected in refusal(path)


def test_safetensors_that_are_none(written: Path) -> None:
    (written / "masks.safetensors").write_bytes(b"\x80\x02}q\x00.")  # a pickle
    seal(written)
    assert "masks.safetensors: not a safetensors file" in refusal(written)


def bomb(size: int) -> Tensor:
    """A zstd frame of a few kilobytes that expands to ``size`` zeros, and says so."""
    stream = zstandard.ZstdCompressor(level=1).compressobj(size=size)
    frame = b"".join(stream.compress(bytes(2**20)) for _ in range(size // 2**20)) + stream.flush()
    return torch.frombuffer(bytearray(frame), dtype=torch.uint8)


def test_a_bomb_is_refused_before_it_expands(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 2**30
    frame = bomb(size)
    assert len(frame) < size / 1000
    edit_tensors(written, "masks", lambda t: t.update({"dispatcher.bits.zst": frame}))
    monkeypatch.setattr(zstandard, "ZstdDecompressor", lambda: pytest.fail("it was expanded"))
    assert f"a mask expands to {size} bytes, not " in refusal(written)
    edit_card(written, lambda c: c["masks"][0].update(weights=8 * size))  # a card that agrees with it
    assert "masks.0.weights: Input should be less than or equal to" in refusal(written)


# --- the wrong backbone


@pytest.fixture(scope="module")
def backbone(small: Bundle) -> Backbone:
    return backbones.load(small.card.backbone.name, small.card.backbone.source)


def not_for(bundle: Bundle, backbone: Backbone) -> str:
    with pytest.raises(BundleError, match="bundle hand/1") as error:
        check(bundle, backbone)
    assert "\n" not in str(error.value)
    return str(error.value)


def with_card(bundle: Bundle, **changes: Any) -> Bundle:
    back = bundle.card.backbone.model_copy(update=changes)
    return replace(bundle, card=bundle.card.model_copy(update={"backbone": back}))


def test_another_backbone(small: Bundle, backbone: Backbone) -> None:
    check(small, backbone)
    other = backbones.load("test_resnet", "random:1")
    assert f"fingerprint {backbone.fingerprint[:12]}, these weights (random:1) have" in not_for(small, other)
    assert "give the right ones with --weights" in not_for(small, backbones.load("test_vit", "random:0"))


def test_what_does_not_fit_the_backbone(small: Bundle, backbone: Backbone) -> None:
    assert "97 features and" in not_for(with_card(small, features=97), backbone)
    assert "8 masks do not fit test_resnet" in not_for(with_card(small, maskable=8), backbone)
    assert "counts its stages as stem layer1" in not_for(with_card(small, stages=["stem", "layer1"]), backbone)
    short = replace(small.dispatcher, bits=small.dispatcher.bits[:-1])
    assert "mask dispatcher has" in not_for(replace(small, dispatcher=short), backbone)
    late = replace(small.dispatcher, start=1)
    assert "mask dispatcher has" in not_for(replace(small, dispatcher=late), backbone)
    for norms in (
        {"bn9.running_mean": torch.zeros(4)},
        {"bn1.running_mean": torch.zeros(4)},
        {"bn1.running_mean": backbone.norms["bn1.running_mean"].double()},
    ):
        foreign = replace(small.experts[0], norms=norms)
        assert "test_resnet has no statistics bn" in not_for(replace(small, experts=(foreign,)), backbone)


# --- all of it or nothing


@pytest.mark.parametrize("step", ["mkdir", "fsync", "rename"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_write_that_fails_leaves_nothing(
    small: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    (tmp_path / "hand").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(os if step == "fsync" else Path, step, fail)
        with pytest.raises(BundleError if isinstance(error, OSError) else KeyboardInterrupt) as raised:
            write(small, tmp_path / "hand" / "1")
    if isinstance(error, OSError):
        assert "can't write" in str(raised.value) and "No space left" in str(raised.value)
    assert not list((tmp_path / "hand").iterdir())
    read(write(small, tmp_path / "hand" / "1"))


def test_everything_is_synced_before_the_rename(small: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def synced(handle: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def renamed(self: Path, target: Path) -> Path:
        done.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    write(small, tmp_path / "hand" / "1")
    *before, staging, middle, after = done
    assert set(before) == set(FILES)
    assert (staging.startswith(".1."), middle, after) == (True, "rename", "hand")


def test_a_version_is_never_overwritten(small: Bundle, written: Path) -> None:
    before = contents(written)
    with pytest.raises(BundleError, match="versions are never overwritten: choose the next number"):
        write(replace(small, linear={}), written)
    assert contents(written) == before
    assert [p.name for p in written.parent.iterdir()] == ["1"]


def test_what_could_not_be_read_back_is_not_written(small: Bundle, tmp_path: Path) -> None:
    bank = small.banks["dispatcher"]
    odd = Bank(bank.embeddings, ("two\nlines", *bank.names[1:]), bank.labels)
    with pytest.raises(BundleError, match="bank"):
        write(replace(small, banks=dict.fromkeys(small.banks, odd)), tmp_path / "hand" / "1")
    assert not list((tmp_path / "hand").iterdir())


def test_half_copied(written: Path) -> None:
    """A copy or a write that was killed: never taken for a bundle, and named where it lies openly."""
    store = written.parent.parent
    hidden = written.parent / ".2.4711.tmp"
    shutil.copytree(written, hidden)
    assert discover(store) == [written]
    half = written.parent / "3"
    half.mkdir()
    for name in ("cascade.json", "masks.safetensors"):
        shutil.copy(written / name, half)
    assert discover(store) == [written, half]
    assert "SHA256SUMS" in refusal(half)


# --- docs/bundle-format.md


@pytest.mark.parametrize("compress", [True, False], ids=["zstd", "plain"])
def test_the_documented_reader_gets_the_same_bits(bundle_path: Path, tmp_path: Path, compress: bool) -> None:
    """The reader in the document knows neither Cascade nor torch; it is run as it stands there."""
    bundle = read(bundle_path)
    path = bundle_path if compress else write(bundle, tmp_path / "plain" / "1", compress=False)
    (reader,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    program = f"""{reader}
import sys
assert not {{"torch", "cascade", "safetensors"}} & set(sys.modules)
card, tensors = read_bundle(sys.argv[1])
bits, names = mask_bits(card, tensors, "dispatcher"), lines(tensors["bank.names"])
np.savez(sys.argv[2], bits=bits, names=names, **{{"fusion": tensors["conditional.weight"]}})
"""
    out = tmp_path / "read.npz"
    subprocess.run([sys.executable, "-I", "-c", program, str(path), str(out)], check=True, cwd=tmp_path)
    found = np.load(out)
    want = unpack(bundle.dispatcher.bits, bundle.card.masks[0].weights).numpy()
    assert found["bits"].dtype == np.bool_
    np.testing.assert_array_equal(found["bits"], want)
    assert 0 < found["bits"].mean() < 1
    assert tuple(found["names"]) == bundle.banks["conditional"].names
    np.testing.assert_array_equal(found["fusion"], bundle.fusions["conditional"].weight.numpy())


def test_the_document_names_every_field_and_layout() -> None:
    text = DOCUMENT.read_text()
    for model in (Card, BackboneCard, MaskCard, RouterCard):
        for field in model.model_fields:
            assert f"`{field}`" in text, f"{model.__name__}.{field}"
    for part in (*KINDS, OutOfDomain, Fusion, Linear, Bank, Thumbnails):
        for layout in part.layout.values():
            dtype, *axes = layout.split()
            assert f"{dtype} [{', '.join(axes)}]" in text, f"{part.__name__}: {layout}"


# --- a bundle is foreign input


@pytest.mark.parametrize("junk", [".DS_Store", "._cascade.json", ".nfs000000", "Thumbs.db"])
def test_what_systems_leave_in_a_folder_is_ignored(written: Path, junk: str) -> None:
    (written / junk).write_bytes(b"x")
    (written / "..data").symlink_to(written)
    assert read(written).name == "hand"


def test_the_digest_covers_every_byte(small: Bundle, written: Path, tmp_path: Path) -> None:
    bits = small.dispatcher.bits.clone()
    bits[0] ^= 1
    other = write(replace(small, dispatcher=replace(small.dispatcher, bits=bits)), tmp_path / "hand" / "2")
    assert digest(read(written)) == digest(small) != digest(read(other))


@pytest.mark.parametrize("name", ["", "a/b", "-a", ".a", "a ", "a\n", "e\u0301", "x" * 65, "\u202ea"])
def test_names_that_no_bundle_can_have(name: str) -> None:
    assert not (NAME.fullmatch(name) and unicodedata.normalize("NFC", name) == name)


@pytest.mark.parametrize("name", ["demo", "1", "v1.2-rc_3", "two words", "b\u00f6se", "\u65e5\u672c"])
def test_names_that_a_bundle_can_have(small: Bundle, tmp_path: Path, name: str) -> None:
    assert read(write(small, tmp_path / name / name)).identity == (name, name)


def test_a_name_is_checked_when_it_is_written_and_when_it_is_read(small: Bundle, written: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="can't be the name"):
        write(small, tmp_path / "hand" / "-1")
    shutil.copytree(written, tmp_path / "hand" / "~1")
    with pytest.raises(BundleError, match="can't be the name"):
        read(tmp_path / "hand" / "~1")


@pytest.mark.parametrize("part", ["linear", "banks", "fusions", "ood"])
def test_numbers_that_are_not_finite(small: Bundle, tmp_path: Path, part: str) -> None:
    def spoiled(part: Any) -> Any:
        name = next(f.name for f in fields(part) if isinstance(getattr(part, f.name), Tensor))
        return replace(part, **{name: torch.full_like(getattr(part, name), float("nan"))})

    value = getattr(small, part)
    bad = {mode: spoiled(p) for mode, p in value.items()} if isinstance(value, dict) else spoiled(value)
    changes: dict[str, Any] = {part: bad}
    with pytest.raises(BundleError, match="not all of its numbers are finite"):
        write(replace(small, **changes), tmp_path / "hand" / "9")


@pytest.mark.parametrize("change", [{"crop_pct": 0.0015}, {"size": 4096}, {"size": 2048, "crop_pct": 0.25}])
def test_preprocessing_that_would_take_gigabytes(tmp_path: Path, change: dict[str, float]) -> None:
    bundle = tiny()
    preprocessing = bundle.card.preprocessing | change
    with pytest.raises(BundleError, match="preprocessing"):
        write(
            replace(bundle, card=bundle.card.model_copy(update={"preprocessing": preprocessing})), tmp_path / "t" / "1"
        )


@pytest.mark.parametrize(
    "source", ["file:/etc/hostname", "file:../x", "package:timm/../../etc/hostname", "random:" + "9" * 5000, "s3:x"]
)
def test_a_card_opens_no_path_of_the_machine(small: Bundle, tmp_path: Path, source: str) -> None:
    card = small.card.model_copy(update={"backbone": small.card.backbone.model_copy(update={"source": source})})
    with pytest.raises(BundleError, match="backbone.source"):
        write(replace(small, card=card), tmp_path / "hand" / "9")


def test_masks_are_in_proportion_to_the_files(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutOfMemory, match="1000 are allowed"):
        read(written, memory=1000)
    monkeypatch.setattr(formats, "ALWAYS", 0)
    monkeypatch.setattr(formats, "RATIO", 0)
    with pytest.raises(BundleError, match="bytes of masks"):
        read(written)
