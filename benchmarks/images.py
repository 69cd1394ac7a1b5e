"""Real images for benchmarks, from the files in tests/data."""

import io
from pathlib import Path

from PIL import Image

DATA = Path(__file__).parents[1] / "tests" / "data"
COLUMNS, ROWS = 20, 15  # of a contact sheet


def jpegs(size: int) -> list[bytes]:
    """The ten photographs as JPEG files of ``size`` x ``size`` pixels."""
    files = []
    for path in sorted((DATA / "photos").glob("*.png")):
        Image.open(path).convert("RGB").resize((size, size)).save(out := io.BytesIO(), "jpeg", quality=90)
        files.append(out.getvalue())
    return files


def sheet(name: str) -> list[Image.Image]:
    """The 300 images of a contact sheet, ``cifar10`` or ``fashion_mnist``, RGB."""
    whole = Image.open(DATA / f"{name}.png").convert("RGB")
    side = whole.width // COLUMNS
    corners = [(column * side, row * side) for row in range(ROWS) for column in range(COLUMNS)]
    return [whole.crop((x, y, x + side, y + side)) for x, y in corners]
