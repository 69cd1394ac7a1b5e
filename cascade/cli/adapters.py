"""``cascade import | domain | map | export``: fine-tuned copies in, what a bundle may lack, plain checkpoints out."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cascade.cli.options import BundlePath, Weights


class Target(StrEnum):
    """What ``cascade export`` writes."""

    timm = "timm"
    onnx = "onnx"
    torchscript = "torchscript"


def import_checkpoint(
    checkpoint: Annotated[
        Path, typer.Argument(help="Fine-tuned copy (.safetensors, .pth) or folder with a PEFT LoRA.")
    ],
    backbone: Annotated[str, typer.Option(help="timm name of the network that was fine-tuned.")],
    out: Annotated[Path, typer.Option(help="Folder to create, <store>/<name>/<version>; must not exist.")],
    source: Annotated[str, typer.Option(help="Weights before fine-tuning: timm, file:PATH or package:PATH.")] = "timm",
    classes: Annotated[Path | None, typer.Option(help="File with class names, one per line.")] = None,
    images: Annotated[Path | None, typer.Option(help="Or a folder with one subfolder per class.")] = None,
    size: Annotated[int | None, typer.Option(help="Side of the images in pixels; default: the network's.")] = None,
    distill: Annotated[Path | None, typer.Option(help="Folder of unlabeled images to train the delta on.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of 64 images for --distill.", min=1)] = 100,
    check: Annotated[Path | None, typer.Option(help="Class folders: compare the accuracy before and after.")] = None,
    weights: Weights = None,
) -> None:
    """Import a fine-tuned copy: [bold]cascade import copy.safetensors --backbone resnet18 --out model_store/mine/1[/]

    The copy becomes a 1-bit delta, a thirtieth of its size.

    [bold]cascade import copy.pth --backbone resnet18 --images photos --distill photos --check test --out mine/1[/]
    """
    from rich.console import Console
    from rich.table import Table

    from cascade.errors import CascadeError
    from training.delta import compare, import_copy, load_backbone

    if classes is not None and images is not None:
        raise CascadeError("give class names by --classes or by --images, not both")
    names = None
    if classes is not None:
        names = classes.read_text().splitlines()
    elif images is not None:
        names = sorted(folder.name for folder in images.iterdir() if folder.is_dir())
    plain = load_backbone(backbone, source, weights)
    path, tuned, losses = import_copy(
        checkpoint, plain, out, classes=names, size=size, distill=distill, domain=distill or images, steps=steps
    )
    table = Table("weight", "change", "lost before distillation", title="what the delta keeps")
    for loss in losses:
        table.add_row(loss.weight, f"{loss.change:.1%}", f"{loss.lost:.1%}")
    Console().print(table)
    size_of = sum(file.stat().st_size for file in path.iterdir())
    typer.echo(f"wrote {path}: {size_of / 1e6:.2f} MB; the copy has {_bytes(checkpoint) / 1e6:.2f} MB")
    if check is not None:
        before, after = compare(path, plain, tuned, check)
        typer.echo(f"accuracy on {check}: {before:.1%} before, {after:.1%} after")


def domain(
    bundle: BundlePath,
    images: Annotated[Path, typer.Argument(help="Folder of images like those to dispatch to it; no labels needed.")],
    out: Annotated[Path, typer.Option(help="Folder to create, <store>/<name>/<version>; must not exist.")],
    weights: Weights = None,
) -> None:
    """Enable dispatch to a bundle: [bold]cascade domain model_store/mine/1 photos --out model_store/mine/2[/]

    Bundles made by [bold]cascade train[/] already have a domain.
    """
    from training.delta import images_in
    from training.domains import add

    typer.echo(f"wrote {add(bundle, images_in(images), out, weights)}")


def map_embeddings(
    bundle: BundlePath,
    out: Annotated[Path, typer.Option(help="Folder to create, <store>/<name>/<version>; must not exist.")],
    data: Annotated[
        str | None,
        typer.Option(help="Images of its training, a folder or data set: also measure how sure the bundle is."),
    ] = None,
    weights: Weights = None,
) -> None:
    """Add a map of its embeddings for the page at /ui: [bold]cascade map model_store/mine/1 --out model_store/mine/2[/]

    Bundles made by [bold]cascade train[/] already have one.
    """
    from training.maps import add

    typer.echo(f"wrote {add(bundle, out, data, weights)}")


def export(
    bundle: BundlePath,
    out: Annotated[Path, typer.Option(help="File to write; must not exist.")],
    to: Annotated[
        Target, typer.Option(help="Format: timm (safetensors with timm's names), onnx or torchscript.")
    ] = Target.timm,
    larger: Annotated[
        bool, typer.Option("--larger", help="Export the larger of two input sizes; default: the smaller.")
    ] = False,
    weights: Weights = None,
) -> None:
    """Write a bundle as a plain model: [bold]cascade export model_store/mine/1 --to onnx --out mine.onnx[/]"""
    from cascade.bundle.export import export as write

    typer.echo(f"wrote {write(bundle, out, to.value, weights, larger=larger)}")


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size
