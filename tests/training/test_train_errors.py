"""Broken images are left out and named; what stops a training says so in one line."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from cascade.bundle.format import read
from tests.helpers.training import OPTIONS, flat, predict, recipe, train
from training import pipeline
from training.cli import Watch, start
from training.run import begin

pytestmark = pytest.mark.slow


# Broken images


def test_trains_on_the_rest_and_names_what_it_left_out(
    cifar_folder: Path, tmp_path: Path, cifar: list[Image.Image], caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(cifar_folder, tmp_path / "photos")
    whole = (folder / "train" / "cat").glob("*.png").__next__().read_bytes()
    bad = {"cat/text.jpg": b"no image at all", "dog/cut.png": whole[: len(whole) // 2], "ship/none.webp": b""}
    for name, raw in bad.items():
        (folder / "train" / name).write_bytes(raw)
    (folder / "test" / "cat" / "half.jpeg").write_bytes(whole[:200])
    bundle = read(train(tmp_path, recipe(folder)))
    assert bundle.card.training["images"] == 240
    names = {f"train/{name}" for name in bad}
    assert all(name in caplog.text for name in names)
    kept = {split: json.loads((tmp_path / "run" / f"{split}.json").read_text()) for split in ("train", "test")}
    assert set(kept["train"]["broken"]) == names and kept["train"]["images"] == 240
    assert set(kept["test"]["broken"]) == {"test/cat/half.jpeg"} and kept["test"]["images"] == 60
    assert all("\n" not in reason and reason for part in kept.values() for reason in part["broken"].values())


def test_a_class_whose_training_images_are_all_broken_keeps_its_place(
    cifar_folder: Path, tmp_path: Path, cifar: list[Image.Image]
) -> None:
    folder = shutil.copytree(cifar_folder, tmp_path / "photos")
    for path in (folder / "train" / "bird").iterdir():
        path.write_bytes(b"")
    bundle = read(train(tmp_path, recipe(folder, clusters=0)))
    assert bundle.card.classes[2] == "bird" and bundle.linear["dispatcher"].weight.shape == (10, 16)
    scores = {label.name: label.score for a in predict(bundle, cifar[:20]) for label in a.labels}
    assert scores.get("bird", 0) == 0 and "ship" in scores


def test_many_broken_images_are_all_in_the_file(tmp_path: Path, cifar: list[Image.Image]) -> None:
    folder = flat(cifar, tmp_path / "photos", 40)
    for i in range(60):
        (folder / f"bad-{i}.jpg").write_bytes(b"?")
    run = begin(tmp_path / "run", recipe(folder, clusters=0), Watch(None))
    broken = {name for images in (run.images, run.held_out) for name, _ in images.broken}
    written = [json.loads((run.folder / f"{split}.json").read_text())["broken"] for split in ("train", "test")]
    assert broken == set(written[0]) | set(written[1]) == {f"bad-{i}.jpg" for i in range(60)}


# What stops it


def command(*arguments: object) -> str:
    """The error of ``cascade train``: one line, exit status 1."""
    with pytest.raises(SystemExit) as told:
        start(pipeline.command, [str(a) for a in arguments])
    line = str(told.value.code)
    assert line.startswith("error: ") and "\n" not in line
    return line


def options_of(root: Path, **changes: object) -> list[object]:
    flags = [[f"--{n.replace('_', '-')}", v] for n, v in (OPTIONS | changes).items()]
    return ["--run", root / "run", "--out", root / "store" / "small" / "1", *sum(flags, [])]


def empty(root: Path, cifar: list[Image.Image]) -> Path:
    (root / "photos").mkdir()
    return root / "photos"


def nothing(root: Path, cifar: list[Image.Image]) -> Path:
    return root / "photos"


def few(root: Path, cifar: list[Image.Image]) -> Path:
    return flat(cifar, root / "photos", 20)


def enough(root: Path, cifar: list[Image.Image]) -> Path:
    return flat(cifar, root / "photos", 60)


def all_broken(root: Path, cifar: list[Image.Image]) -> Path:
    for path in flat(cifar, root / "photos", 60).iterdir():
        path.write_bytes(path.read_bytes()[:50])
    return root / "photos"


def one_class(root: Path, cifar: list[Image.Image]) -> Path:
    flat(cifar[:60], root / "photos" / "train" / "cat", 60)
    flat(cifar[60:], root / "photos" / "test" / "dog", 10)
    return root / "photos"


def one_test_image(root: Path, cifar: list[Image.Image]) -> Path:
    flat(cifar, root / "photos" / "train", 60)
    flat(cifar[60:], root / "photos" / "test", 1)
    return root / "photos"


@pytest.mark.parametrize(
    ("folder", "changes", "says"),
    [
        (empty, {}, "no train images in .*photos: put JPEG, PNG or WebP files there"),
        (nothing, {}, "photos is not a folder: name a folder of images"),
        (few, {}, "16 training images are too few for 3 clusters of 16: add some, or lower --clusters"),
        (few, {"clusters": 0, "limit": 12}, "12 training images are too few for a mask, which needs 16: add some$"),
        (all_broken, {}, "none of the 48 train images in .*photos can be read; .*png: "),
        (one_class, {}, "all training images are in the class folder cat"),
        (one_test_image, {}, "1 test image is too few to calibrate with"),
        (enough, {"mask_from": "layer4"}, "test_efficientnet has no stage 'layer4'; choose 0-6 or: stem blocks.0"),
        (enough, {"backbone": "test_convnext", "mask_from": "norm_pre"}, "nothing to mask from norm_pre on: choose an"),
        (
            enough,
            {"backbone": "test_vit", "size": 160, "mask_from": "-3", "local_crops": 2},
            r"test_vit can't take images of 72 px \(.*\): try another --size, or --local-crops 0",
        ),
        (enough, {"expert_from": "blocks.1"}, "--expert-from is before --mask-from"),
        (enough, {"expert_from": "conv_head", "draws": 2}, "leave --expert-from out, or --draws"),
        (enough, {"backbone": "resnet-five-hundred"}, "timm knows no model 'resnet-five-hundred'"),
        (enough, {"prototypes": 2, "router": "prototypes"}, "2 prototypes can't form 3 clusters"),
    ],
)
def test_errors_are_one_line_that_says_what_to_do(
    folder: Callable[[Path, list[Image.Image]], Path],
    changes: dict[str, object],
    says: str,
    tmp_path: Path,
    cifar: list[Image.Image],
) -> None:
    line = command(folder(tmp_path, cifar), *options_of(tmp_path, **changes))
    assert re.search(says, line), line
    assert not (tmp_path / "store").exists()
    if "prototypes" not in says:
        assert not (tmp_path / "run" / "dispatcher").exists(), "nothing was trained for it"


def test_labels_are_asked_for_where_there_are_none(tmp_path: Path, cifar: list[Image.Image]) -> None:
    line = command(enough(tmp_path, cifar), *options_of(tmp_path), "--labels")
    assert "photos has no class folders: omit --labels" in line


def test_a_version_that_exists_is_found_before_anything_is_trained(cifar_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "store" / "small" / "1"
    out.mkdir(parents=True)
    line = command(cifar_folder, "--run", tmp_path / "run", "--out", out)
    assert "exists and versions are never overwritten: choose a new version" in line
    assert not (tmp_path / "run" / "dispatcher").exists()


def test_folders_that_cannot_be_written_are_found_before_anything_is_trained(
    cifar_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    for place in ("--out", "--run"):
        line = command(
            cifar_folder, "--run", tmp_path / "run", "--out", tmp_path / "a" / "1", place, tmp_path / "file/b"
        )
        assert "file" in line and ("choose another --out" in line or "choose writable folders" in line)
    assert not (tmp_path / "run" / "dispatcher").exists()
