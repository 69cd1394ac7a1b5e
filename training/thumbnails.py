"""Add thumbnails to a finished bundle: a copy of it with pictures of its neighbor bank's images.

python -m training.thumbnails model_store/photos/1 photos/ --out model_store/photos/2
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from cascade.bundle.format import Bundle, read, write
from cascade.bundle.thumbnails import make
from cascade.errors import CascadeError
from training.cli import start
from training.data import dataset
from training.data.dataset import Images
from training.maps import rows_of


def illustrated(bundle: Bundle, images: Images) -> Bundle:
    """Add a picture for each row of the bundle's banks.

    Args:
        images: the training images, possibly with others.

    Raises:
        CascadeError: the bundle has no bank, or one of its images is not among ``images``.
    """
    if not bundle.banks:
        raise CascadeError(f"bundle {bundle.name}/{bundle.version} has no neighbor bank: it needs no thumbnails")
    own = rows_of(next(iter(bundle.banks.values())).names, images)
    return replace(bundle, thumbnails=make(map(own.open, range(len(own)))))


def command(
    bundle: Annotated[Path, typer.Argument(help="Its folder.")],
    data: Annotated[str, typer.Argument(help="Images that it was trained on: a folder, or a published data set.")],
    out: Annotated[Path, typer.Option(help="Bundle to write: <store>/<name>/<version>.")],
) -> None:
    """Add thumbnails to a bundle."""
    print(f"wrote {write(illustrated(read(bundle), dataset.load(data, 'train')), out)}")


if __name__ == "__main__":
    start(command)
