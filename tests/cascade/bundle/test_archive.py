"""A packed bundle comes back to the last byte, and any damage is noticed."""

import io
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard
from PIL import Image

from cascade.bundle import archive, format
from cascade.bundle.format import BundleError, read, write
from tests.helpers.bundles import handmade


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture(scope="module", params=[None, 3])
def bundle(request: pytest.FixtureRequest, cifar: list[Image.Image], tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = handmade(cifar[:48], norms=True, router="prototypes", expert_from=request.param)
    return write(made, tmp_path_factory.mktemp("store") / "hand" / "1")


def test_it_comes_back_to_the_last_byte(bundle: Path, tmp_path: Path) -> None:
    file = archive.pack(bundle, tmp_path / "hand.cascade")
    again = archive.unpack(file, tmp_path / "hand" / "2")
    assert contents(again) == contents(bundle)
    assert archive.pack(bundle, tmp_path / "again").read_bytes() == file.read_bytes()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_damage_is_noticed(bundle: Path, tmp_path: Path) -> None:
    raw = archive.pack(bundle, tmp_path / "good").read_bytes()
    bad = tmp_path / "bad"
    for at in range(8, len(raw), len(raw) // 40):
        bad.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        with pytest.raises(BundleError):
            archive.unpack(bad, tmp_path / "hand" / "3")
    for wrong in (b"", raw[:100], raw[:-1], (bundle / "masks.safetensors").read_bytes()):
        bad.write_bytes(wrong)
        with pytest.raises(BundleError, match="not a packed bundle"):
            archive.unpack(bad, tmp_path / "hand" / "3")
    assert not (tmp_path / "hand").exists()


def test_nothing_is_written_over(bundle: Path, tmp_path: Path) -> None:
    file = archive.pack(bundle, tmp_path / "hand.cascade")
    with pytest.raises(BundleError, match="exists"):
        archive.pack(bundle, file)
    with pytest.raises(BundleError, match="exists"):
        archive.unpack(file, bundle)
    with pytest.raises(BundleError, match="can't read"):
        archive.unpack(tmp_path / "none", tmp_path / "hand" / "4")
    with pytest.raises(BundleError, match="can't write"):
        archive.pack(bundle, tmp_path / "no folder" / "file")
    assert read(bundle).masks


def archive_of(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w", format=tarfile.USTAR_FORMAT) as out:
        for member, content in members:
            out.addfile(member, io.BytesIO(content))
    return zstandard.ZstdCompressor(write_checksum=True).compress(tar.getvalue())


def member(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, "cascade.json"
    return info


@pytest.mark.parametrize(
    "raw",
    [
        zstandard.ZstdCompressor().compress(bytes(archive.ALWAYS + 1)),
        archive_of((member("../../evil.json"), b"")),
        archive_of((member("/tmp/evil.json"), b"")),
        archive_of((member("cascade.json", tarfile.SYMTYPE), b"")),
        archive_of((member("cascade.json", tarfile.GNUTYPE_SPARSE), b"")),
    ],
    ids=["bomb", "parent", "absolute", "link", "sparse"],
)
def test_a_hostile_archive_is_refused(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "evil").write_bytes(raw)
    with pytest.raises(BundleError, match="not a packed bundle"):
        archive.unpack(tmp_path / "evil", tmp_path / "hand" / "1")
    assert [p.name for p in tmp_path.iterdir()] == ["evil"]


def test_masks_are_in_proportion_to_the_archive(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros that compress well must not let the card claim more masks."""
    made = read(bundle)
    folder = tmp_path / "padded" / "1"
    card = made.card.model_copy(update={"training": {"padding": "0" * 2**20}})
    write(replace(made, card=card), folder)
    file = archive.pack(folder, tmp_path / "padded.cascade")
    bits = sum(-(-mask.weights // 8) for mask in card.masks)
    monkeypatch.setattr(format, "ALWAYS", 0)
    monkeypatch.setattr(format, "RATIO", bits / (file.stat().st_size + 2**19))
    with pytest.raises(BundleError, match="bytes of masks"):
        archive.unpack(file, tmp_path / "hand" / "1")
    assert not (tmp_path / "hand" / "1").exists()
    assert read(folder).masks
