"""What is refused: bundles that are damaged, that do not fit, or that would do harm."""

import errno
import io
import os
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from PIL import Image
from torch import Tensor

from cascade.bundle import format as formats
from cascade.bundle.format import Bundle, BundleError, check, read, write
from cascade.errors import OutOfMemory
from cascade.model import backbone as backbones
from cascade.model.backbone import Backbone
from tests.helpers.bundle_files import (
    FILES,
    edit_card,
    edit_tensors,
    refusal,
    seal,
    tiny,
)
from tests.helpers.bundles import handmade

pytestmark = pytest.mark.slow


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
    assert "(notes.txt); copy the whole bundle again" in refusal(written)


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


CARDS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "format 3": (lambda c: c.update(format=3), "format 3, this version reads 1 to 2"),
    "a later format": (lambda c: c.update(format=3, novelty=[1]), "format 3, this version reads 1 to 2"),
    "format 0": (lambda c: c.update(format=0), "format 0, this version reads 1 to 2"),
    "no format": (lambda c: c.pop("format"), "format: Field required"),
    "format in words": (lambda c: c.update(format="one"), "format: "),
    "unknown field": (lambda c: c.update(novelty=1), "novelty: Extra inputs"),
    "no backbone": (lambda c: c.pop("backbone"), "backbone: Field required"),
    "fingerprint": (lambda c: c["backbone"].update(fingerprint="abc"), "backbone.fingerprint: "),
    "no masks": (lambda c: c.update(masks=[]), "masks: "),
    "mode": (lambda c: c.update(mode="both"), "mode: "),
    "preprocessing": (lambda c: c["preprocessing"].update(std=[0, 0, 0]), "std must be positive"),
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
    "shares": (lambda c: c["router"].update(shares=[1.0]), "one share per expert"),
    "fewer masks": (lambda c: c["masks"].pop(), "one share per expert"),
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
    "router value": ("router", lambda t: t["router.cluster"].fill_(2), "one cluster per expert"),
    "router count": ("router", lambda t: t["router.clusters"].fill_(3), "one cluster per expert"),
    "router part": ("router", lambda t: t.pop("router.head"), "fit together"),
    "router novelty": ("router", lambda t: t.update({"router.new": torch.ones(1)}), "fit together"),
    "ood mean": ("router", bump("ood.mean"), "ood: mean is float32 [97], should be float32 F"),
    "ood variance": ("router", bump("ood.variance"), "ood: variance is float32"),
    "ood noise": ("router", bump("ood.noise"), "ood: noise is float32 [2], should be float32 1"),
    "ood flat": ("router", lambda t: t.update({"ood.basis": t["ood.basis"].flatten()}), "ood: basis is float16 ["),
    "ood short": ("router", lambda t: t.update({"ood.quantiles": t["ood.quantiles"][:1].clone()}), "two or more"),
    "slots": ("fusion", bump("unconditional.weight"), "fusion unconditional has 4 slots"),
    "conditional": (
        "fusion",
        lambda t: t.update({"conditional.weight": t["dispatcher.weight"].clone()}),
        "has 1 slots",
    ),
    "no default": ("fusion", lambda t: t.pop("conditional.weight"), "no fusion for its default mode conditional"),
    "fusion bias": ("fusion", lambda t: t.pop("dispatcher.bias"), "fit together"),
    "slot bias": (
        "fusion",
        lambda t: t.update({"unconditional.bias": t["unconditional.bias"].repeat(3, 1)}),
        "a bias for each slot, which format 1 does not have",
    ),
    "slots of bias": (
        "fusion",
        lambda t: t.update({"unconditional.bias": t["unconditional.bias"].repeat(2, 1)}),
        "bias is float32 [2, 8], should be float32 slots dim",
    ),
    "fusion dtype": ("fusion", cast("dispatcher.weight", torch.float32), "should be float16 slots F dim"),
    "head": ("heads", bump("dispatcher.linear.weight"), "head dispatcher: weight is float32 [4, 8]"),
    "bank rows": ("heads", bump("dispatcher.bank"), "bank dispatcher: embeddings is float16 [21, 8]"),
    "bank names": ("heads", lambda t: t["bank.names"].fill_(255), "fit together"),
    "no names": ("heads", lambda t: t.pop("bank.names"), "bank.names"),
    "thumbnails": ("thumbnails", lambda t: t.pop("thumbnails.offsets"), "fit together"),
    "picture rows": ("thumbnails", bump("thumbnails.offsets"), "offsets is int64 [22], should be int64 rows+1"),
    "picture dtype": ("thumbnails", cast("thumbnails.offsets", torch.float32), "should be int64 rows+1"),
    "picture bytes": ("thumbnails", cast("thumbnails.data", torch.int8), "data is int8"),
    "picture first": ("thumbnails", lambda t: t["thumbnails.offsets"][:1].fill_(1), "do not increase from 0 to"),
    "picture order": ("thumbnails", lambda t: t["thumbnails.offsets"][3:4].fill_(0), "do not increase from 0 to"),
    "picture end": ("thumbnails", lambda t: t["thumbnails.offsets"][-1:].add_(9), "do not increase from 0 to"),
    "picture before": ("thumbnails", lambda t: t["thumbnails.offsets"][1:2].fill_(-9), "do not increase from 0 to"),
    "no picture": ("thumbnails", lambda t: t["thumbnails.data"][:9].fill_(0), "row 0: this is not a JPEG, PNG or WebP"),
    "cut picture": ("thumbnails", lambda t: t["thumbnails.offsets"][1:2].sub_(99), "row 0: the image is truncated"),
    "large picture": ("thumbnails", one_picture(lambda: Image.new("RGB", (129, 8))), "row 0: the image is 129 x 8 pix"),
    "heavy picture": ("thumbnails", one_picture(noise), "the limit is 0.015625"),
    "map rows": ("map", bump("map.points"), "map: points is float16 [21, 2], should be float16 rows 2"),
    "map width": (
        "map",
        lambda t: t.update({"map.points": t["map.points"].repeat(1, 2)}),
        "points is float16 [20, 4], should be float16 rows 2",
    ),
    "map dtype": ("map", cast("map.clusters", torch.int64), "clusters is int64 [20], should be int16 rows"),
    "map part": ("map", lambda t: t.pop("map.clusters"), "fit together"),
    "map place": ("map", lambda t: t["map.points"][3:4].fill_(1.5), "its points are not within 0 to 1"),
    "map nowhere": ("map", lambda t: t["map.points"][3:4].fill_(float("nan")), "its points are not within 0 to 1"),
    "map cluster": ("map", lambda t: t["map.clusters"][:1].fill_(2), "its clusters are not within -1 to 1"),
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
    assert "pass the right ones with --weights" in not_for(small, backbones.load("test_vit", "random:0"))


def test_what_does_not_fit_the_backbone(small: Bundle, backbone: Backbone) -> None:
    assert "97 features and" in not_for(with_card(small, features=97), backbone)
    assert "8 weights do not fit test_resnet" in not_for(with_card(small, maskable=8), backbone)
    assert "has the stages stem layer1" in not_for(with_card(small, stages=["stem", "layer1"]), backbone)
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
