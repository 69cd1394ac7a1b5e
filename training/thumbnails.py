"""Thumbnails for a bundle that was made without: the same bundle, and pictures of its neighbor bank's images.

python -m training.thumbnails model_store/photos/1 photos/ --out model_store/photos/2
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from cascade.bundle.format import Bundle, read, write
from cascade.bundle.thumbnails import make
from cascade.errors import CascadeError
from training.data import dataset
from training.data.dataset import Images
from training.export import one_line


def illustrated(bundle: Bundle, images: Images) -> Bundle:
    """The bundle with a picture for each row of its banks.

    Args:
        images: the training images, or more than those.

    Raises:
        CascadeError: the bundle has no bank, or one of its images is not among ``images``.
    """
    if not bundle.banks:
        raise CascadeError(f"bundle {bundle.name}/{bundle.version} has no neighbor bank: it needs no thumbnails")
    places = {one_line(name): i for i, name in enumerate(images.names)}
    names = next(iter(bundle.banks.values())).names
    if missing := [name for name in names if name not in places]:
        raise CascadeError(
            f"{len(missing)} of {len(names)} images are not there, {missing[0]} for one: give the data of its training"
        )
    return replace(bundle, thumbnails=make(images.open(places[name]) for name in names))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("bundle", type=Path, help="its folder")
    options.add_argument("data", help="folder of images, or cifar10, fashion-mnist: what it was trained on")
    options.add_argument("--out", type=Path, required=True, help="<store>/<name>/<version>, must not exist")
    chosen = options.parse_args()
    try:
        print(f"wrote {write(illustrated(read(chosen.bundle), dataset.load(chosen.data, 'train')), chosen.out)}")
    except CascadeError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
