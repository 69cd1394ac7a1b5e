"""``cascade heads add | remove``: change the classes of a bundle without training."""

from pathlib import Path
from typing import Annotated

import typer

from cascade.cli.options import BundlePath, Weights

heads = typer.Typer(
    help="Add classes to a bundle, or remove them, without training.", no_args_is_help=True, rich_markup_mode="rich"
)
Out = Annotated[
    Path | None, typer.Option(help="Folder to create, <store>/<name>/<version>; default: the next version.")
]


@heads.command()
def add(
    bundle: BundlePath,
    images: Annotated[Path, typer.Argument(help="Folder with one subfolder of images per class, new or known.")],
    out: Out = None,
    weights: Weights = None,
) -> None:
    """Add classes, or more images of known ones, in seconds: [bold]cascade heads add model_store/mine/1 photos[/]

    The mask does not change. The bundle must be trained with [bold]cascade train --labels --extensible[/].
    """
    from training import new_classes

    added = new_classes.add(bundle, images, out or new_classes.next_version(bundle), weights)
    counts = ", ".join(f"{name} {count}" for name, count in added.images.items())
    typer.echo(f"wrote {added.path} with {counts} images")
    if added.held_out:
        typer.echo(f"{added.accuracy:.1%} of {added.held_out} new images were right while they were held out")


@heads.command()
def remove(
    bundle: BundlePath,
    classes: Annotated[list[str], typer.Argument(help="Classes to remove.")],
    out: Out = None,
) -> None:
    """Remove classes: [bold]cascade heads remove model_store/mine/1 cat dog[/]"""
    from training import new_classes

    typer.echo(f"wrote {new_classes.remove(bundle, classes, out or new_classes.next_version(bundle))}")
