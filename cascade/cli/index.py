"""``cascade index build | search | duplicates | outliers``."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cascade.cli.options import Weights
from cascade.errors import printable


class IndexKind(StrEnum):
    """Kinds of ``cascade index build``."""

    flat = "flat"
    ivf = "ivf"
    hnsw = "hnsw"


class Placed(StrEnum):
    """Devices of FAISS."""

    cpu = "cpu"
    cuda = "cuda"


index = typer.Typer(help="Search predicted images: build, search, duplicates, outliers.", no_args_is_help=True)
IndexPath = Annotated[Path, typer.Argument(help="Folder that cascade index build wrote.")]
Device = Annotated[Placed, typer.Option(help="Device of FAISS; cuda needs the extra gpu.")]
Pages = Annotated[Path | None, typer.Option("--html", help="HTML page to write, with the pictures.")]


@index.command("build")
def index_build(
    predictions: Annotated[Path, typer.Argument(help="Output of cascade predict, with embeddings.")],
    out: Annotated[Path, typer.Option(help="Folder to create.")],
    kind: Annotated[IndexKind, typer.Option(help="flat is exact; ivf and hnsw are faster for many rows.")] = (
        IndexKind.flat
    ),
    device: Device = Placed.cpu,
) -> None:
    """Index the embeddings: [bold]cascade index build predictions --out photos.index[/]"""
    from cascade.offline.index import build

    about = build(predictions, out, kind.value, device.value)
    typer.echo(f"{about.rows} rows in {out}, {about.kind}, {about.dim} numbers each")


@index.command("search")
def index_search(
    folder: IndexPath,
    images: Annotated[list[Path], typer.Argument(help="Images to search for.")],
    bundle: Annotated[Path, typer.Option(help="The bundle that made the index.")] = Path("model_store/paper/1"),
    k: Annotated[int, typer.Option("-k", help="Results for each image.", min=1)] = 10,
    device: Device = Placed.cpu,
    weights: Weights = None,
) -> None:
    """Find similar images: [bold]cascade index search photos.index cat.jpg -k 5[/]"""
    from cascade.engine.engine import load
    from cascade.engine.results import ItemError
    from cascade.offline.index import read, search

    found = read(folder, device.value)
    failed = False
    for image, results in zip(images, search(found, load(bundle, weights=weights), images, k), strict=True):
        if isinstance(results, ItemError):
            typer.echo(f"error: {image}: {results.message}", err=True)
            failed = True
            continue
        typer.echo(str(image))
        for each in results:
            typer.echo(f"  {each['similarity']:.3f}  {printable(each['path'])}")
    if failed:
        raise typer.Exit(1)


@index.command("duplicates")
def index_duplicates(
    folder: IndexPath,
    out: Annotated[Path, typer.Option(help="Table to write, .parquet or .csv.")],
    threshold: Annotated[float, typer.Option(help="Minimum cosine similarity.", min=-1, max=1)] = 0.98,
    html: Pages = None,
) -> None:
    """Find near-duplicates: [bold]cascade index duplicates photos.index --out duplicates.csv --html look.html[/]"""
    from cascade.offline.index import duplicates, read
    from cascade.offline.report import duplicates_page, write_table

    found = duplicates(read(folder), threshold)
    write_table(found, out)
    typer.echo(f"{len(found)} images in {len(set(found['group'].to_pylist()))} groups, in {out}")
    if html is not None:
        duplicates_page(found, threshold, html)


@index.command("outliers")
def index_outliers(
    folder: IndexPath,
    out: Annotated[Path, typer.Option(help="Table to write, .parquet or .csv.")],
    top: Annotated[int, typer.Option(help="Number of images.", min=1)] = 100,
    k: Annotated[int, typer.Option("-k", help="Number of neighbors in the mean distance.", min=1)] = 10,
    html: Pages = None,
) -> None:
    """Find the images farthest from all others: [bold]cascade index outliers photos.index --out odd.csv[/]"""
    from cascade.offline.index import outliers, read
    from cascade.offline.report import outliers_page, write_table

    found = outliers(read(folder), top, k)
    write_table(found, out)
    typer.echo(f"{len(found)} images in {out}")
    if html is not None:
        outliers_page(found, html)
