"""Images from folders and by name, the decode-once cache, and the stream of batches."""

import itertools
import json
import logging
import os
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets
from torchvision.transforms.v2 import functional as reference

from cascade.errors import CascadeError
from cascade.model.preprocessing import Preprocessing
from tests.helpers.datasets import photo, put
from tests.helpers.paths import DATA
from training.data import dataset, scan


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data sets' folder, and no network whatever happens."""

    def offline(*_: object, **__: object) -> None:
        raise URLError("no network in tests")

    monkeypatch.setenv("CASCADE_DATA", str(tmp_path / "store"))
    monkeypatch.setattr(datasets.CIFAR10, "download", offline)
    monkeypatch.setattr(datasets.FashionMNIST, "download", offline)
    return tmp_path / "store"


# Folders


def test_a_flat_folder_is_unlabeled_and_a_fixed_fifth_is_held_out(tmp_path: Path) -> None:
    folder = put(tmp_path / "photos", [f"{i:02}.png" for i in range(10)] + ["deep/er/10.JPG", "deep/11.webp"])
    (folder / "notes.txt").write_text("not an image, nor named like one")
    put(folder, [".hidden/a.png", ".b.png"])
    train, test = dataset.load(folder, "train"), dataset.load(folder, "test", seed=7)
    assert (len(train), len(test)) == (10, 2)
    assert sorted(train.names + test.names) == [f"{i:02}.png" for i in range(10)] + [
        "deep/11.webp",
        "deep/er/10.JPG",
    ]
    assert train.labels is None and train.classes == [] and train.broken == []
    assert dataset.load(folder, "test", seed=0).names == test.names
    assert train.open(0).mode == "RGB"
    name = next(n for n in train.names if len(n) == 6)
    assert train.open(train.names.index(name)) == photo(int(name[:2]))


def test_class_folders_label_both_splits_alike(tmp_path: Path) -> None:
    folder = put(tmp_path / "photos", [f"{c}/{i % 2}/{i}.png" for i in range(10) for c in ("dog", "cat")])
    for split, n in (("train", 16), ("test", 4)):
        images = dataset.load(folder, split)  # type: ignore[arg-type]
        assert images.classes == ["cat", "dog"] and len(images) == n
        assert images.labels is not None and images.labels.dtype == np.int64
        assert [images.classes[k] for k in images.labels] == [name.split("/")[0] for name in images.names]
    put(folder, ["stray.png"])
    assert dataset.load(folder, "train").labels is None


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_own_splits_are_used(tmp_path: Path, held_out: str) -> None:
    folder = put(
        tmp_path,
        ["train/b/0.png", "train/c/1.png", f"{held_out}/a/2.png", f"{held_out}/c/3.png", "other.png"],
    )
    train, test = dataset.load(folder, "train"), dataset.load(folder, "test")
    assert train.names == ["train/b/0.png", "train/c/1.png"]
    assert test.names == [f"{held_out}/a/2.png", f"{held_out}/c/3.png"]
    assert train.classes == test.classes == ["a", "b", "c"]
    assert train.labels is not None and train.labels.tolist() == [1, 2]
    assert test.labels is not None and test.labels.tolist() == [0, 2]


def test_broken_images_are_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = put(tmp_path / "photos", [f"train/{i}.png" for i in range(4)] + ["test/ok.png"])
    (folder / "train/1.png").write_bytes((folder / "train/2.png").read_bytes()[:500])
    (folder / "train/empty.jpg").touch()
    (folder / "train/text.jpeg").write_text("hello")
    (folder / "train/dangling.png").symlink_to("nowhere.png")
    images = dataset.load(folder, "train")
    assert images.names == ["train/0.png", "train/2.png", "train/3.png"]
    named = ["train/1.png", "train/dangling.png", "train/empty.jpg", "train/text.jpeg"]
    assert [name for name, _ in images.broken] == named
    reasons = dict(images.broken)
    assert "truncated" in reasons["train/1.png"] and "zero bytes" in reasons["train/empty.jpg"]
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "left out 4 of 7 train images" in warning and all(name in warning for name in named)
    assert dataset.load(folder, "test").broken == []


def test_folders_without_a_usable_image_are_errors(tmp_path: Path) -> None:
    with pytest.raises(CascadeError, match=r"nowhere is not a folder: name a folder of images, or cifar10"):
        dataset.load(tmp_path / "nowhere", "train")
    with pytest.raises(CascadeError, match="no train images in .*: put JPEG, PNG or WebP files there"):
        dataset.load(tmp_path, "train")
    for name in "abcdef":
        (tmp_path / f"{name}.png").write_text("no image")
    with pytest.raises(CascadeError, match=r"none of the 5 train images in .* can be read; \w.png: "):
        dataset.load(tmp_path, "train")
    with pytest.raises(CascadeError, match="at least one"):
        dataset.load(tmp_path, "train", limit=0)


def test_limit_is_balanced_seeded_and_only_grows(tmp_path: Path) -> None:
    names = (
        [f"train/cat/{i:02}.png" for i in range(24)] + [f"train/dog/{i:02}.png" for i in range(6)] + ["test/cat/0.png"]
    )
    folder = put(tmp_path, names)
    small, large = dataset.load(folder, "train", 8), dataset.load(folder, "train", 20)
    assert small.labels is not None and np.bincount(small.labels).tolist() == [4, 4]
    assert large.labels is not None and np.bincount(large.labels).tolist() == [14, 6]
    assert set(small.names) < set(large.names) and small.names == sorted(small.names)
    assert dataset.load(folder, "train", 8).names == small.names != dataset.load(folder, "train", 8, seed=1).names
    assert len(dataset.load(folder, "train", 500)) == 30


def test_the_fingerprint_tells_data_apart(tmp_path: Path) -> None:
    folder = put(tmp_path, [f"train/{c}/{i}.png" for c in "ab" for i in range(3)] + ["test/a/9.png"])

    def fingerprint() -> str:
        return dataset.load(folder, "train").fingerprint()

    seen = [fingerprint()]
    assert fingerprint() == seen[0] and dataset.load(folder, "train").take(range(6)).fingerprint() == seen[0]
    pixels = np.array(Image.open(folder / "train/a/0.png"))
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(folder / "train/a/0.png")
    seen.append(fingerprint())
    (folder / "train/a/0.png").rename(folder / "train/a/x.png")
    seen.append(fingerprint())
    (folder / "train/b").rename(folder / "train/c")
    seen.append(fingerprint())
    seen.append(dataset.load(folder, "train", limit=3).fingerprint())
    assert len(set(seen)) == 5


def test_a_second_start_reads_only_what_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = put(tmp_path / "photos", ["train/0.png", "train/1.png", "train/2.png", "test/3.png"])
    (folder / "train/1.png").write_text("broken")
    opened: list[str] = []
    decode = scan.read

    def read(path: Path) -> Image.Image:
        opened.append(path.name)
        return decode(path)

    monkeypatch.setattr(scan, "read", read)
    first = dataset.load(folder, "train")
    assert sorted(opened) == ["0.png", "1.png", "2.png"]
    opened.clear()
    second = dataset.load(folder, "train")
    assert opened == [] and second.fingerprint() == first.fingerprint() and second.broken == first.broken
    photo(5).save(folder / "train/1.png")
    assert len(dataset.load(folder, "train")) == 3 and opened == ["1.png"]


def test_a_loop_of_links_ends(tmp_path: Path) -> None:
    folder = put(tmp_path / "photos", ["train/a/0.png", "test/a/1.png"])
    (folder / "train/a/loop").symlink_to(folder)
    elsewhere = put(tmp_path / "elsewhere", ["2.png"])
    (folder / "train/b").symlink_to(elsewhere)
    assert dataset.load(folder, "train").names == ["train/a/0.png", "train/b/2.png"]


# The cache


def test_cache_resizes_the_shorter_side_and_cuts_the_middle(tmp_path: Path) -> None:
    sheet = Image.open(DATA / "cifar10.png")  # 640 x 480
    wide, tall = sheet.crop((0, 0, 640, 320)), sheet.crop((0, 0, 200, 400))
    for name, image in (("train/tall.png", tall), ("train/wide.png", wide), ("test/x.png", tall)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        image.save(tmp_path / name)
    pixels = dataset.cache(dataset.load(tmp_path, "train"), 100)
    for ours, image in zip(pixels, (tall, wide), strict=True):
        resized = reference.resize(image, [100], interpolation=reference.InterpolationMode.BICUBIC)
        theirs = np.asarray(reference.center_crop(resized, [100])).transpose(2, 0, 1)
        assert np.abs(ours.astype(int) - theirs).mean() < 0.5  # of 255; they round between two passes


def test_an_interrupted_cache_goes_on_and_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = put(tmp_path / "photos", [f"train/{i:02}.png" for i in range(40)] + ["test/x.png"])
    images = dataset.load(folder, "train")
    expected = dataset.cache(images, 24)
    opened: list[str] = []
    decode = dataset.read

    def read(path: Path) -> Image.Image:
        if len(opened) == 25:
            raise KeyboardInterrupt
        opened.append(path.name)
        return decode(path)

    monkeypatch.setattr(dataset, "read", read)
    monkeypatch.setattr(scan.os, "cpu_count", lambda: 1)
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        dataset.cache(images, 24, run / "images.npy")
    (part,) = run.iterdir()
    with open(part, "r+b") as file:
        file.truncate(part.stat().st_size - 1000)  # killed while it wrote a row of 1728 bytes
    opened.clear()
    resumed = dataset.cache(images, 24, run / "images.npy")
    assert opened == [f"{i:02}.png" for i in range(24, 40)]
    assert np.array_equal(resumed, expected) and isinstance(resumed, np.memmap)

    opened.clear()
    assert np.array_equal(dataset.cache(images, 24, run / "images.npy"), expected) and opened == []
    other = dataset.cache(images.take([3, 2]), 24, run / "images.npy")
    assert np.array_equal(other, expected[[3, 2]])
    assert sorted(p.suffix for p in run.iterdir()) == [".npy", ".npy"]


# Batches


@pytest.mark.parametrize(("n", "batch"), [(10, 3), (12, 4), (3, 8), (5, 5)])
def test_batches_go_on_from_any_step_as_if_undisturbed(n: int, batch: int) -> None:
    whole = [b.tolist() for b in itertools.islice(dataset.batches(n, batch, seed=5), 20)]
    assert all(len(b) == batch for b in whole)
    for start in range(12):
        rest = itertools.islice(dataset.batches(n, batch, seed=5, start_step=start), 20 - start)
        assert [b.tolist() for b in rest] == whole[start:]
    assert whole != [b.tolist() for b in itertools.islice(dataset.batches(n, batch, seed=6), 20)]


def test_an_epoch_takes_every_image_at_most_once_and_differs_from_the_next() -> None:
    assert dataset.steps_per_epoch(10, 3) == 3
    steps = list(itertools.islice(dataset.batches(10, 3, seed=0), 300))
    epochs = [np.concatenate(steps[i : i + 3]) for i in range(0, 300, 3)]
    assert all(len(set(epoch.tolist())) == 9 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 100
    share = np.bincount(np.concatenate(epochs), minlength=10) / 100
    assert share.min() > 0.8  # the one that an epoch drops is not always the same


def test_fewer_images_than_a_batch_go_round() -> None:
    for indices in itertools.islice(dataset.batches(3, 8, seed=0), 5):
        assert sorted(np.bincount(indices)) == [2, 3, 3]


@pytest.mark.parametrize(("train", "test"), [("Train", "valid"), ("training", "Validation"), ("train", "dev")])
def test_usual_names_of_splits_in_any_case(tmp_path: Path, train: str, test: str) -> None:
    folder = put(tmp_path, [f"{train}/a/0.png", f"{train}/b/1.png", f"{test}/a/2.png", f"{test}/b/3.png"])
    images = dataset.load(folder, "train")
    assert images.names == [f"{train}/a/0.png", f"{train}/b/1.png"] and images.classes == ["a", "b"]
    assert dataset.load(folder, "test").names == [f"{test}/a/2.png", f"{test}/b/3.png"]


@pytest.mark.parametrize(
    "folders", [("train2017", "val2017"), ("my_train", "my_test"), ("test", "val"), ("train", "Train", "test")]
)
def test_folders_that_look_like_splits_are_never_classes(tmp_path: Path, folders: tuple[str, ...]) -> None:
    folder = put(tmp_path, [f"{name}/{i}.png" for name in folders for i in range(2)])
    with pytest.raises(CascadeError, match=r"look like splits \(.*\): name them train and test"):
        dataset.load(folder, "train")


def test_a_class_of_trains_is_a_class(tmp_path: Path) -> None:
    folder = put(tmp_path, [f"{name}/{i}.png" for name in ("train", "bus", "trainer") for i in range(3)])
    assert dataset.load(folder, "train").classes == ["bus", "train", "trainer"]


def test_a_stray_image_beside_class_folders_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = put(tmp_path, [*(f"{name}/{i}.png" for name in ("a", "b") for i in range(3)), "stray.png"])
    assert dataset.load(folder, "train").labels is None
    assert "labels are not used, as 1 images lie beside the class folders (stray.png)" in caplog.text


def test_names_that_are_not_utf8_are_escaped(tmp_path: Path) -> None:
    folder = put(tmp_path, [f"{name}/{i}.png" for name in ("a", "b") for i in range(3)])
    (folder / "b").rename(folder / os.fsdecode(b"caf\xe9"))
    images = dataset.load(folder, "train")
    assert images.classes == ["a", "caf\\xe9"]
    json.dumps(images.names, ensure_ascii=False).encode()
    assert all(images.open(i).size == (32, 32) for i in range(len(images)))


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, scandir = put(tmp_path, [*(f"{i}.png" for i in range(6)), "locked/x.png"]), os.scandir

    def denied(path: str) -> object:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)  # chmod does not stop root
    images = dataset.load(folder, "train")
    assert images.broken == [("locked", "the folder cannot be listed: check its permissions")]


def test_evaluation_views_are_those_of_the_transform(tmp_path: Path) -> None:
    images = dataset.load(put(tmp_path, [f"{i}.png" for i in range(5)]), "train")
    preprocessing = Preprocessing(24, 0.875, "bicubic", (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    pixels = dataset.cache_evaluation(images, preprocessing, tmp_path / "run" / "images.npy")
    assert pixels.dtype == np.uint8 and pixels.shape == (4, 3, 24, 24)
    expected = torch.stack([preprocessing.transform()(images.open(i)) for i in range(4)])
    assert torch.equal(preprocessing.normalize(pixels), expected)
