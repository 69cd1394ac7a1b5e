"""Every published data set by name, from a small tree of its true layout: the right files, labels and classes."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

from cascade.errors import CascadeError
from training.data import arrays, dataset, published


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CASCADE_DATA", str(tmp_path))
    return tmp_path


def put(folder: Path, names: list[str], images: list[Image.Image]) -> None:
    for name, image in zip(names, images, strict=False):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / name)


def flowers102(root: Path, images: list[Image.Image], patch: pytest.MonkeyPatch) -> None:
    put(root / "flowers-102/jpg", [f"image_{i:05d}.jpg" for i in range(1, 7)], images)
    savemat(root / "flowers-102/imagelabels.mat", {"labels": [[3, 1, 102, 1, 3, 2]]})
    savemat(root / "flowers-102/setid.mat", {"trnid": [[2, 4]], "valid": [[1, 5]], "tstid": [[3, 6]]})
    files = datasets.Flowers102._file_dict.items()  # the checksums are those of the real tables
    patch.setattr(datasets.Flowers102, "_file_dict", {k: (name, None) for k, (name, _) in files})


def food101(root: Path, images: list[Image.Image], patch: pytest.MonkeyPatch) -> None:
    rows = {"train": {"waffles": ["waffles/1"], "apple_pie": ["apple_pie/2", "apple_pie/3"]}}
    rows["test"] = {"waffles": ["waffles/9"], "apple_pie": ["apple_pie/8"]}
    (root / "food-101/meta").mkdir(parents=True)
    for split, table in rows.items():
        (root / f"food-101/meta/{split}.json").write_text(json.dumps(table))
        put(root / "food-101/images", [f"{n}.jpg" for names in table.values() for n in names], images)


def pets(root: Path, images: list[Image.Image], patch: pytest.MonkeyPatch) -> None:
    base = root / "oxford-iiit-pet"
    put(
        base / "images",
        ["Abyssinian_1.jpg", "Abyssinian_2.jpg", "great_pyrenees_7.jpg", "great_pyrenees_8.jpg"],
        images,
    )
    (base / "annotations").mkdir()
    (base / "annotations/trainval.txt").write_text("Abyssinian_1 1 1 1\ngreat_pyrenees_7 2 2 1\n")
    (base / "annotations/test.txt").write_text("great_pyrenees_8 2 2 1\nAbyssinian_2 1 1 1\n")


def dtd(root: Path, images: list[Image.Image], patch: pytest.MonkeyPatch) -> None:
    lists = {
        "train1": ["banded/a.jpg", "woven/b.jpg"],
        "val1": ["woven/c.jpg", "banded/f.jpg"],
        "test1": ["woven/d.jpg", "banded/e.jpg"],
    }
    (root / "dtd/dtd/labels").mkdir(parents=True)
    for name, files in lists.items():
        (root / f"dtd/dtd/labels/{name}.txt").write_text("\n".join(files) + "\n")
        put(root / "dtd/dtd/images", files, images)


def eurosat(root: Path, images: list[Image.Image], patch: pytest.MonkeyPatch) -> None:
    names = [f"{c}/{c}_{i}.jpg" for c in ("AnnualCrop", "Forest") for i in (1, 2)]
    put(root / "eurosat/2750", names, images)
    rows = [[n, int(n > "F"), "Forest" if n > "F" else "Annual Crop Land"] for n in names]
    table = {"train": rows[::2], "val": [], "test": rows[1::2]}
    (root / "eurosat/split_zhou_EuroSAT.json").write_text(json.dumps(table))


def sun397(root: Path, images: list[Image.Image], patch: pytest.MonkeyPatch) -> None:
    base = root / "SUN397"
    names = ["a/abbey/sun_1.jpg", "a/apse/indoor/sun_2.jpg", "a/abbey/sun_3.jpg", "a/apse/indoor/sun_4.jpg"]
    put(base, names, images)
    (base / "ClassName.txt").write_text("/a/abbey\n/a/apse/indoor\n")
    (base / "Training_01.txt").write_text(f"/{names[1]}\n/{names[0]}\n")
    (base / "Testing_01.txt").write_text(f"/{names[2]}\n/{names[3]}\n")


def ucf101(root: Path, images: list[Image.Image], patch: pytest.MonkeyPatch) -> None:
    base = root / "ucf101"
    names = [f"Apply_Lipstick/v_ApplyLipstick_g0{i}_c01.jpg" for i in (1, 2)] + ["Yo_Yo/v_YoYo_g01_c01.jpg"]
    put(base / "UCF-101-midframes", names, images)
    (base / "classInd.txt").write_text("1 ApplyLipstick\n2 YoYo\n")
    train = "YoYo/v_YoYo_g01_c01.avi 2\nApplyLipstick/v_ApplyLipstick_g02_c01.avi 1\n"
    (base / "trainlist01.txt").write_text(train)
    (base / "testlist01.txt").write_text("ApplyLipstick/v_ApplyLipstick_g01_c01.avi\n")


def inatloc500(root: Path, images: list[Image.Image], patch: pytest.MonkeyPatch) -> None:
    base = root / "inatloc500"
    rows = {
        "train": ["train/00_Quercus/1.jpg,1", "train/01_Aix/2.jpg,0"],
        "test": ["test/Aves/Aix galericulata/3.jpg,0"],
    }
    for split, lines in rows.items():
        put(base, [line.rpartition(",")[0] for line in lines], images)
        (base / "metadata" / split).mkdir(parents=True)
        (base / f"metadata/{split}/class_labels.txt").write_text("\n".join(lines) + "\n")
    (base / "metadata/class_names.txt").write_text("Aix galericulata\nQuercus alba\n")


def cifar100(root: Path, images: list[Image.Image], patch: pytest.MonkeyPatch) -> None:
    folder = root / "cifar-100-python"
    folder.mkdir()
    for name, labels in (("train", [7, 99]), ("test", [0])):
        pixels = np.stack([np.asarray(image).transpose(2, 0, 1).ravel() for image in images[: len(labels)]])
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "fine_labels": labels}))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": arrays.CLASSES["cifar100"]}))
    patch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)  # the checksums of the real files


Expected = tuple[list[str], list[str], int]  # classes of the training images, of the test images, classes in all
SETS: dict[str, tuple[Callable[[Path, list[Image.Image], pytest.MonkeyPatch], None], Expected]] = {
    "flowers102": (
        flowers102,
        (
            ["pink primrose", "pink primrose", "canterbury bells", "canterbury bells"],
            ["blackberry lily", "hard-leaved pocket orchid"],
            102,
        ),
    ),
    "food101": (food101, (["waffles", "apple_pie", "apple_pie"], ["waffles", "apple_pie"], 2)),
    "pets": (pets, (["Abyssinian", "Great Pyrenees"], ["Great Pyrenees", "Abyssinian"], 2)),
    "dtd": (dtd, (["banded", "woven", "woven", "banded"], ["woven", "banded"], 2)),
    "eurosat": (eurosat, (["Annual Crop Land", "Forest"], ["Annual Crop Land", "Forest"], 2)),
    "sun397": (sun397, (["apse/indoor", "abbey"], ["abbey", "apse/indoor"], 2)),
    "ucf101": (ucf101, (["YoYo", "ApplyLipstick"], ["ApplyLipstick"], 2)),
    "inatloc500": (inatloc500, (["Quercus alba", "Aix galericulata"], ["Aix galericulata"], 2)),
    "cifar100": (cifar100, (["beetle", "worm"], ["apple"], 100)),
}


@pytest.mark.parametrize("name", SETS)
def test_split(name: str, store: Path, cifar: list[Image.Image], monkeypatch: pytest.MonkeyPatch) -> None:
    build, (train, test, classes) = SETS[name]
    build(store, cifar, monkeypatch)
    for split, expected in (("train", train), ("test", test)):
        images = dataset.load(name, split)  # type: ignore[arg-type]
        assert images.labels is not None and images.labels.dtype == np.int64
        assert [images.classes[k] for k in images.labels] == expected
        assert len(images.classes) == classes and len(set(images.names)) == len(images)
        assert images.open(0).size == (32, 32)
    assert not set(dataset.load(name, "train").names) & set(dataset.load(name, "test").names)


def test_coops_split_goes_before_the_data_sets_own(store: Path, cifar: list[Image.Image]) -> None:
    dtd(store, cifar, pytest.MonkeyPatch())
    table = {"train": [["woven/d.jpg", 46, "woven"]], "val": [["woven/b.jpg", 46, "woven"]]}
    table["test"] = [["banded/a.jpg", 0, "banded"]]
    (store / "dtd/split_zhou_DescribableTextures.json").write_text(json.dumps(table))
    images = dataset.load("dtd", "train")
    assert images.names == ["dtd/images/woven/d.jpg"] and images.classes == ["banded", "woven"]
    assert images.labels is not None and images.labels.tolist() == [1]


@pytest.mark.parametrize("name", published.PLACES)
def test_what_is_missing_is_said_in_one_line_with_the_way_to_get_it(name: str, store: Path) -> None:
    with pytest.raises(
        CascadeError, match=rf"{name} is not at {store}.*: (run python -m training.data.published|get )"
    ) as error:
        dataset.load(name, "train")
    assert "\n" not in str(error.value)


def test_a_tree_without_its_tables_is_not_guessed_at(store: Path, cifar: list[Image.Image]) -> None:
    eurosat(store, cifar, pytest.MonkeyPatch())
    (store / "eurosat/split_zhou_EuroSAT.json").unlink()
    with pytest.raises(CascadeError, match=r"eurosat has no split of its own: put CoOp's split_zhou_\*\.json into"):
        dataset.load("eurosat", "train")
    ucf101(store, cifar, pytest.MonkeyPatch())
    (store / "ucf101/classInd.txt").unlink()
    with pytest.raises(CascadeError, match=r"ucf101 in .* is not whole \(.*classInd.txt.*\): get it again"):
        dataset.load("ucf101", "train")


def test_only_what_torchvision_has_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(datasets.DTD, "__init__", lambda self, root, download: asked.append(download))
    published.download("dtd")
    assert asked == [True]
    with pytest.raises(CascadeError, match="ucf101 can't be downloaded from here: get UCF-101-midframes.zip"):
        published.download("ucf101")
