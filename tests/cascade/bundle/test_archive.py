"""A packed bundle is smaller, comes back to the last byte, and every damage is noticed."""

from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

from cascade.bundle import archive
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
    sent, kept = (
        sum(t.numel() for n, t in load_file(f).items() if ".bits." in n) for f in (file, bundle / "masks.safetensors")
    )
    assert sent < kept, "masks are smaller than as zstd frames"
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
