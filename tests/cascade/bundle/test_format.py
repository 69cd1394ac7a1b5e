"""The bundle on disk: the same bytes for the same inputs, every change noticed, all of it or nothing."""

import errno
import os
import re
import shutil
import struct
import subprocess
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
from PIL import Image

from cascade.bundle.files import NAME
from cascade.bundle.format import Bundle, BundleError, check, digest, read, write
from cascade.bundle.schema import BackboneCard, Card, DeferralCard, MaskCard, RouterCard
from cascade.bundle.store import Store
from cascade.bundle.thumbnails import Thumbnails
from cascade.model import backbone as backbones
from cascade.model.fusion import Fusion, SlotBias
from cascade.model.heads import Bank, Linear
from cascade.model.masks import density, difference, unpack
from cascade.model.out_of_domain import OutOfDomain
from cascade.model.router import KINDS
from tests.helpers.bundle_files import (
    FILES,
    contents,
    equal,
    every_tensor,
    refusal,
    tiny,
    whole,
)
from tests.helpers.bundles import handmade
from tests.helpers.paths import ROOT

DOCUMENT = ROOT / "docs" / "bundle-format.md"


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


def test_a_bias_for_each_slot_needs_format_2(cifar: list[Image.Image], tmp_path: Path) -> None:
    bundle = handmade(cifar[:30], slots="padded")
    plain = bundle.fusions["conditional"]
    biased = SlotBias(plain.weight, plain.weight[:, 0].float())
    bundle = replace(bundle, fusions=bundle.fusions | {"conditional": biased})
    found = read(write(bundle, tmp_path / "hand" / "1"))
    fusion = found.fusions["conditional"]
    assert found.card.format == 2 and isinstance(fusion, SlotBias) and fusion.bias.equal(biased.bias)


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
    with pytest.raises(BundleError, match="versions are never overwritten: choose a new version"):
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
    (written.parent / "4").mkdir()  # no card yet
    (written.parent / "notes.txt").touch()
    assert [*Store(store).look()] == [("hand", written.name)]
    half = written.parent / "3"
    half.mkdir()
    for name in ("cascade.json", "masks.safetensors"):
        shutil.copy(written / name, half)
    assert [*Store(store).look()] == [("hand", written.name), ("hand", "3")]
    assert "SHA256SUMS" in refusal(half)


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
    for model in (Card, BackboneCard, MaskCard, RouterCard, DeferralCard):
        for field in model.model_fields:
            assert f"`{field}`" in text, f"{model.__name__}.{field}"
    for part in (*KINDS, OutOfDomain, Fusion, Linear, Bank, Thumbnails):
        for layout in part.layout.values():
            dtype, *axes = layout.split()
            assert f"{dtype} [{', '.join(axes)}]" in text, f"{part.__name__}: {layout}"


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
