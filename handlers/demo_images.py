"""The images of the demo: test images of every customer, whose labels are known, or a person's own."""

from dataclasses import dataclass
from pathlib import Path

from cascade.errors import CascadeError
from handlers import process

CUSTOMERS = process.ROOT / "tests" / "data" / "customers"
"""``<customer>/<label>-<number>``, drawn from the test sets by a seed; what is in NOBODY belongs to none."""
NOBODY = "nobody"
NAMED = ("paper", "objects")
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
    """

    name: str
    content: bytes
    bundle: str | None = None
    customer: str | None = None
    label: str | None = None


def samples(folder: Path) -> list[Sample]:
    """The images in a folder. Raises DemoError."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in TYPES)
    if not paths:
        raise DemoError(f"no image in {folder}: name a folder of JPEG, PNG or WebP files")
    if folder.resolve() != CUSTOMERS:
        return [Sample(path.stem, path.read_bytes()) for path in paths]
    dispatched = sorted(map(_sample, paths), key=lambda sample: sample.customer == NOBODY)
    bundle, customer = NAMED
    named = [Sample(s.name, s.content, bundle, None, s.label) for s in dispatched if s.customer == customer]
    return dispatched + named[:2]


def _sample(path: Path) -> Sample:
    customer, label = path.parent.name, path.stem.rpartition("-")[0]
    if customer == NOBODY:
        return Sample(f"{customer}/{path.stem}", path.read_bytes(), customer=customer)
    return Sample(f"{customer}/{label}", path.read_bytes(), customer=customer, label=label)
