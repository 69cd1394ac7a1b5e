"""The images of the demo: test images of every customer, whose labels are known, or a person's own."""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from cascade.errors import CascadeError
from handlers import process

CUSTOMERS = process.ROOT / "tests" / "data" / "customers"
"""``<customer>.webp`` with test images side by side, drawn by a seed; ``labels.json``; ``nobody/``: images of none."""
NOBODY = "nobody"
COLUMNS = 10  # images side by side
COUNTED, SHOWN = 50, 5  # images of each customer, and those of them in the table
NAMED, NAMED_SHOWN = ("paper", "objects"), 2
"""A bundle that images are never dispatched to, and the customer whose images it is asked about by name."""
TYPES = (".jpg", ".jpeg", ".png", ".webp")


class DemoError(CascadeError):
    """There is no image to send, an image was not answered, or the servers disagree."""


@dataclass(frozen=True)
class Sample:
    """One image.

    Attributes:
        name: for the table. bundle: that is named in the request; None to have it dispatched.
        customer, label: the truth; None where nobody knows it.
        shown: whether it is in the table, not only counted.
    """

    name: str
    content: bytes
    bundle: str | None = None
    customer: str | None = None
    label: str | None = None
    shown: bool = True


def samples(folder: Path | None = None, counted: int = COUNTED) -> list[Sample]:
    """The images in a folder; without one, ``counted`` of each customer, those of nobody, and those sent by name.

    Raises DemoError.
    """
    if folder is not None:
        return [Sample(path.stem, path.read_bytes()) for path in _files(folder)]
    labels = json.loads((CUSTOMERS / "labels.json").read_text())
    own = [sample for customer in labels for sample in _drawn(customer, labels[customer][:counted])]
    nobody = [
        Sample(f"{NOBODY}/{path.stem}", path.read_bytes(), customer=NOBODY) for path in _files(CUSTOMERS / NOBODY)
    ]
    bundle, customer = NAMED
    named = [
        replace(sample, bundle=bundle, customer=None) for sample in _drawn(customer, labels[customer][:NAMED_SHOWN])
    ]
    return own + nobody + named


def _files(folder: Path) -> list[Path]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in TYPES)
    if not paths:
        raise DemoError(f"no image in {folder}: name a folder of JPEG, PNG or WebP files")
    return paths


def _drawn(customer: str, labels: list[str]) -> Iterator[Sample]:
    """The first test images of a customer, as PNG files."""
    with Image.open(CUSTOMERS / f"{customer}.webp") as sheet:
        side = sheet.width // COLUMNS
        for i, label in enumerate(labels):
            left, top = i % COLUMNS * side, i // COLUMNS * side
            file = io.BytesIO()
            sheet.crop((left, top, left + side, top + side)).save(file, "PNG", compress_level=1)
            yield Sample(f"{customer}/{label}", file.getvalue(), None, customer, label, i < SHOWN)
