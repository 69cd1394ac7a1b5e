"""``cascade index build | add | remove | search | duplicates | outliers``."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cascade.cli.options import Weights
from cascade.errors import CascadeError, printable


class IndexKind(StrEnum):
    """Kinds of ``cascade index build``."""

    flat = "flat"
    ivf = "ivf"
    hnsw = "hnsw"


class Placed(StrEnum):
    """Devices of FAISS."""

    cpu = "cpu"
    cuda = "cuda"


index = typer.Typer(
    help="Search predicted images: build, add, remove, search, duplicates, outliers.", no_args_is_help=True
)
IndexPath = Annotated[Path, typer.Argument(help="Folder that cascade index build wrote.")]
Device = Annotated[Placed, typer.Option(help="Device of FAISS; cuda needs the extra gpu.")]
Bundle = Annotated[Path, typer.Option(help="The bundle that made the index.")]
Metadata = Annotated[
    Path | None, typer.Option(help="More columns for filters and answers: .csv or .parquet with a column path.")
]
Where = Annotated[list[str] | None, typer.Option(help="Condition such as price<10; repeat it for several.")]
BUNDLE = Path("model_store/paper/1")
Pages = Annotated[Path | None, typer.Option("--html", help="HTML page to write, with the pictures.")]


@index.command("build")
def index_build(
    predictions: Annotated[Path, typer.Argument(help="Output of cascade predict, with embeddings.")],
    out: Annotated[Path, typer.Option(help="Folder to create.")],
    kind: Annotated[IndexKind, typer.Option(help="flat is exact; ivf and hnsw are faster for many rows.")] = (
        IndexKind.flat
    ),
    metadata: Metadata = None,
    device: Device = Placed.cpu,
) -> None:
    """Index the embeddings: [bold]cascade index build predictions --out photos.index[/]"""
    from cascade.offline.index import build

    about = build(predictions, out, kind.value, device.value, metadata)
    typer.echo(f"{about.rows} rows in {out}, {about.kind}, {about.dim} numbers each")


@index.command("add")
def index_add(
    folder: IndexPath,
    images: Annotated[list[str] | None, typer.Argument(help="Images, as for cascade predict.")] = None,
    predictions: Annotated[
        Path | None, typer.Option(help="Instead of images: output of cascade predict, with embeddings.")
    ] = None,
    metadata: Metadata = None,
    bundle: Bundle = BUNDLE,
    weights: Weights = None,
) -> None:
    """Add images: [bold]cascade index add photos.index new/[/]

    A path that the index already has is replaced. A server with this index uses the new rows within seconds.
    """
    from cascade.engine.engine import load
    from cascade.offline.index import add, add_images
    from cascade.progress import progress

    if (images is None) == (predictions is None):
        raise CascadeError("name images, or --predictions, but not both")
    if predictions is not None:
        change = add(folder, predictions, metadata)
    else:
        engine = load(bundle, weights=weights)
        with progress("predicting") as advance:
            change = add_images(folder, engine, images or [], metadata, advance)
    typer.echo(f"{change.added} rows added, {change.removed} replaced, {change.about.rows} in {folder}")


@index.command("remove")
def index_remove(
    folder: IndexPath,
    ids: Annotated[list[int] | None, typer.Argument(help="Ids, as cascade index search shows them.")] = None,
    where: Where = None,
) -> None:
    """Remove images: [bold]cascade index remove photos.index 17 18[/]

    [bold]cascade index remove photos.index --where 'path~holiday/'[/]
    """
    from cascade.offline.index import remove

    if (ids is None) == (where is None):
        raise CascadeError("name ids, or --where, but not both")
    change = remove(folder, ids or (), where or ())
    typer.echo(f"{change.removed} rows removed, {change.about.rows} in {folder}")


@index.command("search")
def index_search(
    folder: IndexPath,
    images: Annotated[list[Path], typer.Argument(help="Images to search for.")],
    bundle: Bundle = BUNDLE,
    k: Annotated[int, typer.Option("-k", help="Results for each image.", min=1)] = 10,
    where: Where = None,
    device: Device = Placed.cpu,
    weights: Weights = None,
) -> None:
    """Find similar images: [bold]cascade index search photos.index cat.jpg -k 5[/]"""
    from cascade.engine.engine import load
    from cascade.engine.results import ItemError
    from cascade.offline.index import read, search

    if where and device is not Placed.cpu:
        raise CascadeError("--where searches on the CPU: omit --device")
    found = read(folder, device.value)
    among = found.matching(where or ())
    failed = False
    answers = search(found, load(bundle, weights=weights), images, k, among)
    for image, results in zip(images, answers, strict=True):
        if isinstance(results, ItemError):
            typer.echo(f"error: {image}: {results.message}", err=True)
            failed = True
            continue
        typer.echo(str(image))
        for each in results:
            more = {"label": each["label"]} | each["metadata"]
            texts = [each["path"], *(f"{name}={value}" for name, value in more.items() if value is not None)]
            typer.echo(f"  {each['similarity']:.3f}  {each['id']}  {printable('  '.join(texts))}")
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
