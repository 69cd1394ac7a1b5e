"""The paper's file-based data sets, by name, with their published splits (appendix I).

    python -m training.data.published flowers102        # downloads it; nothing else here does

Layouts are torchvision's, below ``training.data.arrays.root()``; torchvision reads those for which it has a split. A
``split_zhou_*.json`` of CoOp (Zhou et al. 2022) in a data set's folder takes precedence: these are the splits of the
paper. Without it, validation images are used for training.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cascade.errors import CascadeError
from training.data.arrays import SourceError, root

Split = Literal["train", "test"]
Rows = tuple[list[Path], list[int], list[str]]  # files, their labels, the classes' names


@dataclass(frozen=True)
class Place:
    """The location and origin of a data set.

    Attributes:
        folder: below the root. images: below that. dataset: torchvision's class; empty if none fits.
        origin: what to download by hand if torchvision cannot.
    """

    folder: str
    images: str
    dataset: str = ""
    origin: str = ""


PLACES = {
    "flowers102": Place("flowers-102", "jpg", "Flowers102"),
    "food101": Place("food-101", "images", "Food101"),
    "pets": Place("oxford-iiit-pet", "images", "OxfordIIITPet"),
    "dtd": Place("dtd", "dtd/images", "DTD"),
    "eurosat": Place("eurosat", "2750", "EuroSAT"),
    "sun397": Place("SUN397", "", "SUN397"),
    "ucf101": Place("ucf101", "UCF-101-midframes", origin="UCF-101-midframes.zip, whose links CoOp's DATASETS.md has"),
    "inatloc500": Place("inatloc500", "", origin="images and metadata from github.com/visipedia/inat_loc"),
}


def listing(name: str, split: Split) -> Rows:
    """Files, labels and class names of one split; both splits have the same classes.

    Raises:
        SourceError: the data set is missing, or has no split.
    """
    place = PLACES[name]
    folder = root() / place.folder
    images = folder / place.images
    if not images.is_dir():
        way = f"run python -m training.data.published {name}" if place.dataset else f"get {place.origin}"
        raise SourceError(f"{name} is not at {images}: {way}, or set CASCADE_DATA to where it is")
    try:
        if split_file := next(iter(sorted(folder.glob("split_zhou_*.json"))), None):
            return _coop(split_file, images, split)
        match name:
            case "flowers102" | "food101" | "pets" | "dtd":
                return _torchvision(place.dataset, split)
            case "sun397":
                return _sun397(folder, split)
            case "ucf101":
                return _ucf101(folder, images, split)
            case "inatloc500":
                return _inatloc500(folder, split)
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise SourceError(f"{name} in {folder} is not whole ({' '.join(str(error).split())}): get it again") from error
    raise SourceError(f"{name} has no split of its own: put CoOp's split_zhou_*.json into {folder}")


def _torchvision(dataset: str, split: Split) -> Rows:
    from torchvision import datasets

    names = ["test"] if split == "test" else {"Food101": ["train"], "OxfordIIITPet": ["trainval"]}.get(dataset)
    parts = [getattr(datasets, dataset)(root(), split=part) for part in names or ["train", "val"]]
    files = [Path(f) for part in parts for f in getattr(part, "_image_files", None) or part._images]
    return files, [label for part in parts for label in part._labels], list(parts[0].classes)


def _coop(file: Path, images: Path, split: Split) -> Rows:
    """{"train": [[path, label, class name], ..], "val": .., "test": ..}"""
    parts: dict[str, list[tuple[str, int, str]]] = json.loads(file.read_text())
    classes = dict(sorted((int(label), name) for part in parts.values() for _, label, name in part))
    index = {label: i for i, label in enumerate(classes)}
    rows = parts[split]
    return [images / p.lstrip("/") for p, _, _ in rows], [index[int(k)] for _, k, _ in rows], list(classes.values())


def _sun397(folder: Path, split: Split) -> Rows:
    """The first of the ten partitions: 50 training and 50 test images per class."""
    classes = [line.strip()[3:] for line in _lines(folder / "ClassName.txt")]
    names = [
        line.strip().lstrip("/")
        for line in _lines(folder / {"train": "Training_01.txt", "test": "Testing_01.txt"}[split])
    ]
    return [folder / n for n in names], [classes.index(n[2:].rpartition("/")[0]) for n in names], classes


def _ucf101(folder: Path, images: Path, split: Split) -> Rows:
    """The first of the three lists of videos; frames are named after their videos."""
    frames = {path.stem: path for path in images.rglob("*.jpg")}
    classes = [line.split()[1] for line in _lines(folder / "classInd.txt")]
    videos = [line.split()[0] for line in _lines(folder / f"{split}list01.txt")]
    files = [frames[Path(video).stem] for video in videos]
    return files, [classes.index(video.split("/")[0]) for video in videos], classes


def _inatloc500(folder: Path, split: Split) -> Rows:
    """The metadata's table of each split, "path,label"; "val" is for localization and left out."""
    fields = [line.split(",") for line in _lines(folder / "metadata" / "class_names.txt")]
    classes = [next(f for f in line if not f.strip().isdecimal()) for line in fields]
    rows = [line.rpartition(",") for line in _lines(folder / "metadata" / split / "class_labels.txt")]
    return [folder / path for path, _, _ in rows], [int(label) for _, _, label in rows], classes


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line.strip()]


def download(name: str) -> None:
    """Let torchvision download a data set into the root.

    Raises:
        SourceError: torchvision does not have it, or can't get it.
    """
    place = PLACES.get(name)
    if place is None or not place.dataset:
        origin = f": get {place.origin}" if place else f"; choose one of {', '.join(PLACES)}"
        raise SourceError(f"{name} can't be downloaded from here{origin}")
    from torchvision import datasets

    try:
        dataset_class: Any = getattr(datasets, place.dataset)
        dataset_class(root(), download=True)
    except (OSError, RuntimeError) as error:
        raise SourceError(f"torchvision can't download {name} ({' '.join(str(error).split())[:200]})") from error


if __name__ == "__main__":
    try:
        for wanted in sys.argv[1:]:
            download(wanted)
    except CascadeError as error:
        sys.exit(f"error: {error}")
