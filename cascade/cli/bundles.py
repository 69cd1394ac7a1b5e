"""``cascade inspect | verify | pack | unpack``: bundles on disk."""

from pathlib import Path
from typing import Annotated

import typer

from cascade.cli.options import BundlePath, Weights


def inspect(bundle: BundlePath) -> None:
    """Show a bundle's card: its backbone, training data and accuracy."""
    from cascade.bundle.format import read
    from cascade.bundle.inspect import show

    show(read(bundle))


def verify(bundle: BundlePath, weights: Weights = None) -> None:
    """Verify every byte of a bundle, and that it fits its backbone: format, checksums, fingerprint, shapes."""
    from cascade.bundle.format import check, read
    from cascade.model import backbone

    found = read(bundle)
    want = found.card.backbone
    check(found, backbone.load(want.name, want.source, weights))
    typer.echo(f"{bundle} is whole and fits {want.name} ({want.fingerprint[:12]})")


def pack(bundle: BundlePath, file: Annotated[Path, typer.Argument(help="File to write: paper-1.cascade.")]) -> None:
    """Pack a bundle into one small file: [bold]cascade pack model_store/paper/1 paper-1.cascade[/]"""
    from cascade.bundle import archive

    written = archive.pack(bundle, file)
    typer.echo(f"{written}: {written.stat().st_size / 1e6:.2f} MB; cascade unpack {written.name} makes a bundle of it")


def unpack(
    file: Annotated[Path, typer.Argument(help="File written by cascade pack.")],
    bundle: Annotated[Path, typer.Argument(help="Folder to create, <store>/<name>/<version>; must not exist.")],
) -> None:
    """Unpack a packed bundle: [bold]cascade unpack paper-1.cascade model_store/paper/2[/]"""
    from cascade.bundle import archive

    typer.echo(f"wrote {archive.unpack(file, bundle)}")
