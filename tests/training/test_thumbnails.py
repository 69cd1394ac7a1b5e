"""Pictures for a bundle that has none: the same bytes as if they had been asked for at once."""

from dataclasses import replace
from pathlib import Path

import pytest

from cascade.bundle.format import read, write
from cascade.bundle.thumbnails import make
from cascade.errors import CascadeError
from cascade.model.decoding import read as read_image
from training.cli import start
from training.data import dataset
from training.thumbnails import command, illustrated


def test_the_same_bundle_as_with_the_option(
    bundle_path: Path,
    cifar_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bare = write(replace(read(bundle_path), thumbnails=None), tmp_path / "bare" / "1")
    assert not (bare / "thumbnails.safetensors").exists()
    out = tmp_path / "small" / "2"
    arguments = [str(bare), str(cifar_folder), "--out", str(out)]
    with pytest.raises(SystemExit) as done:
        start(command, arguments)
    assert done.value.code == 0
    assert capsys.readouterr().out == f"wrote {out}\n"
    assert all((out / file.name).read_bytes() == file.read_bytes() for file in bundle_path.iterdir())
    with pytest.raises(SystemExit, match="error: .*versions are never overwritten"):
        start(command, arguments)


def test_pictures_are_those_of_the_banks_images(bundle_path: Path, cifar_folder: Path) -> None:
    bundle = read(bundle_path)
    assert bundle.thumbnails is not None
    for row, name in enumerate(bundle.banks["conditional"].names):
        expected = make([read_image(cifar_folder / name)])[0]
        assert bundle.thumbnails[row] == expected


def test_other_images_are_refused(bundle_path: Path, cifar_folder: Path) -> None:
    bundle = read(bundle_path)
    with pytest.raises(CascadeError, match="100 of 100 images are not there, .*: give the data of its training"):
        illustrated(bundle, dataset.load(cifar_folder, "test"))
    with pytest.raises(CascadeError, match="has no neighbor bank"):
        illustrated(replace(bundle, banks={}), dataset.load(cifar_folder, "train"))
