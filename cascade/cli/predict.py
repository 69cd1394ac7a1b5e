"""``cascade predict``: offline predictions of many images."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from cascade.cli.options import Executor, ExecutorKind, Weights
from cascade.errors import CascadeError
from cascade.extras import library


class EmbeddingKind(StrEnum):
    """How ``cascade predict`` stores embeddings."""

    none = "none"
    float16 = "float16"
    float32 = "float32"


def predict(
    sources: Annotated[list[str], typer.Argument(help="Images, folders, globs, .tar, .parquet, lists (.txt), URLs.")],
    out: Annotated[Path, typer.Option(help="Folder for Parquet files, or one file where it ends in .parquet.")],
    bundle: Annotated[Path, typer.Option(help="The bundle's folder.")] = Path("model_store/demo/1"),
    mode: Annotated[str | None, typer.Option(help="dispatcher, conditional or unconditional.")] = None,
    embedding: Annotated[EmbeddingKind, typer.Option(help="How embeddings are stored.")] = EmbeddingKind.float16,
    labels: Annotated[int, typer.Option(help="Labels of an image at most.", min=0)] = 5,
    neighbors: Annotated[int, typer.Option(help="Neighbors of an image at most.", min=0)] = 0,
    batch: Annotated[int, typer.Option(help="Images in a pass.", min=1)] = 256,
    threads: Annotated[int | None, typer.Option(help="Decoding threads; one a core if left out.", min=1)] = None,
    rows: Annotated[int, typer.Option(help="Rows of a Parquet file.", min=1)] = 4096,
    report: Annotated[Path | None, typer.Option(help="HTML file to write: clusters, errors, pictures, a map.")] = None,
    ray: Annotated[bool, typer.Option("--ray", help="Run on Ray: RAY_ADDRESS, or this machine.")] = False,
    workers: Annotated[int | None, typer.Option(help="--ray: engines at most; one per CPU if left out.", min=1)] = None,
    executor: Executor = ExecutorKind.auto,
    weights: Weights = None,
) -> None:
    """Predict offline: [bold]cascade predict photos/ --out predictions --bundle model_store/demo/1[/]

    If it was killed, the same command resumes it.

    [bold]cascade predict 'photos/**/*.jpg' more.tar --out predictions.parquet --report report.html[/]

    [bold]cascade predict s3://bucket/shards/*.tar urls.txt --out predictions --embedding float32[/]
    """
    from cascade.engine.engine import Options, load
    from cascade.offline.job import files_of
    from cascade.offline.predict import bar, predict_files
    from cascade.offline.report import check, write

    if workers is not None and not ray:
        raise CascadeError("--workers is an option of --ray: omit it, or add --ray")
    library("pyarrow")  # before the weights are read
    if report is not None:
        check(report, out)
    engine = load(bundle, weights=weights, executor=executor.value)
    options = Options(mode=mode, labels=labels, neighbors=neighbors)
    numbers: dict[str, Any] = {"batch": batch, "threads": threads, "rows": rows}
    if ray:
        from handlers.ray.batch_predict import on_ray

        numbers |= {"threads": threads or 1, "run": on_ray(bundle, weights, executor.value, workers)}
    with bar("predicting") as progress:
        found = predict_files(engine, sources, out, options, embedding=embedding.value, progress=progress, **numbers)
    speed = f"{found.fresh} of them now, {found.images_per_second:.1f} images a second" if found.fresh else "all before"
    typer.echo(f"{found.rows} rows in {out}, {speed}")
    if found.fresh:
        typer.echo("time: " + ", ".join(f"{name} {100 * share:.1f} %" for name, share in found.shares.items()))
    for cluster, share in found.clusters.items():
        typer.echo(f"  {100 * share:.1f} % in cluster {cluster}")
    for kind, number in found.errors.items():
        typer.echo(f"  {number} with error {kind}")
    if report is not None:
        write(found, files_of(out), found.trained, report)
        typer.echo(f"report in {report}")
