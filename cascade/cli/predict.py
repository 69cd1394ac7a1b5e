"""``cascade predict``: offline predictions of many images."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cascade.cli.options import Executor, ExecutorKind, Weights
from cascade.errors import CascadeError
from cascade.extras import library

if TYPE_CHECKING:
    from cascade.engine.engine import Engine
    from cascade.offline.predict import Summary


class EmbeddingKind(StrEnum):
    """How ``cascade predict`` stores embeddings."""

    none = "none"
    float16 = "float16"
    float32 = "float32"


def predict(
    sources: Annotated[list[str], typer.Argument(help="Images, folders, globs, .tar, .parquet, lists (.txt), URLs.")],
    out: Annotated[Path, typer.Option(help="Folder for Parquet files, or a file that ends in .parquet.")],
    bundle: Annotated[
        Path, typer.Option(help="The bundle's folder; auto: each image's own, of all in --model-store.")
    ] = Path("model_store/paper/1"),
    model_store: Annotated[
        str, typer.Option(help="--bundle auto: bundles, <name>/<version>: a folder or a URL.")
    ] = "model_store",
    mode: Annotated[
        str | None, typer.Option(help="dispatcher, conditional, unconditional; or fast, adaptive, full.")
    ] = None,
    embedding: Annotated[EmbeddingKind, typer.Option(help="How to store embeddings.")] = EmbeddingKind.float16,
    labels: Annotated[int, typer.Option(help="Maximum labels per image.", min=0)] = 5,
    neighbors: Annotated[int, typer.Option(help="Maximum neighbors per image.", min=0)] = 0,
    batch: Annotated[int, typer.Option(help="Images per forward pass.", min=1)] = 256,
    threads: Annotated[int | None, typer.Option(help="Decoding threads; default: one per core.", min=1)] = None,
    rows: Annotated[int, typer.Option(help="Rows per Parquet file.", min=1)] = 4096,
    report: Annotated[
        Path | None, typer.Option(help="HTML report to write: clusters, errors, pictures, a map.")
    ] = None,
    ray: Annotated[bool, typer.Option("--ray", help="Use the Ray cluster of RAY_ADDRESS, or start one here.")] = False,
    workers: Annotated[int | None, typer.Option(help="--ray: maximum engines; default: one per CPU.", min=1)] = None,
    executor: Executor = ExecutorKind.auto,
    weights: Weights = None,
) -> None:
    """Predict offline: [bold]cascade predict photos/ --out predictions --bundle model_store/paper/1[/]

    Run an interrupted job again with the same options to resume it.

    [bold]cascade predict 'photos/**/*.jpg' more.tar --out predictions.parquet --report report.html[/]

    [bold]cascade predict photos/ --out predictions --bundle auto --model-store model_store --embedding none[/]

    [bold]cascade predict s3://bucket/shards/*.tar urls.txt --out predictions --embedding float32[/]
    """
    from cascade.engine.engine import Engine, load
    from cascade.engine.results import AUTO, Options
    from cascade.offline.job import files_of, parts_folder
    from cascade.offline.predict import predict_files
    from cascade.offline.report import check, write
    from cascade.progress import progress

    # Invalid options are reported before the weights are read, which takes longer.
    library("pyarrow")
    if workers is not None and not ray:
        raise CascadeError("--workers is an option of --ray: omit it, or add --ray")
    parts_folder(out)
    if report is not None:
        check(report, out)
    auto = str(bundle) == AUTO
    if auto and (ray or report is not None):
        raise CascadeError("--bundle auto writes rows only, in this process: omit --ray and --report")
    if auto:
        engine = _with_store(Engine(weights=weights, executor=executor.value), model_store)
    else:
        engine = load(bundle, weights=weights, executor=executor.value)
    options = Options(AUTO if auto else None, mode=mode, labels=labels, neighbors=neighbors)
    settings: dict[str, Any] = {"batch": batch, "threads": threads, "rows": rows, "embedding": embedding.value}
    if ray:
        from handlers.ray.batch_predict import on_ray

        settings |= {"threads": threads or 1, "run": on_ray(bundle, weights, executor.value, workers)}
    with progress("predicting") as advance:
        summary = predict_files(engine, sources, out, options, progress=advance, **settings)
    _show(summary, out, auto)
    if report is not None:
        write(summary, files_of(out), summary.trained, report)
        typer.echo(f"report in {report}")


def _with_store(engine: "Engine", model_store: str) -> "Engine":
    """The engine with every valid bundle of the store; others are named in warnings."""
    from cascade.engine.stores import load_store

    for state in load_store(engine, model_store).states():
        if state.reason:
            typer.echo(f"warning: without {state.name}/{state.version}: {state.reason}", err=True)
    return engine


def _show(summary: "Summary", out: Path, auto: bool) -> None:
    """Print the summary of a job."""
    speed = (
        f"{summary.fresh} of them now, {summary.images_per_second:.1f} images a second"
        if summary.fresh
        else "all before"
    )
    typer.echo(f"{summary.rows} rows in {out}, {speed}")
    if summary.fresh:
        typer.echo("time: " + ", ".join(f"{name} {100 * share:.1f} %" for name, share in summary.shares.items()))
    if summary.deferred is not None:
        typer.echo(f"  {100 * summary.deferred:.1f} % asked again at the larger input size")
    for name, share in summary.bundles.items() if auto else ():
        typer.echo(f"  {100 * share:.1f} % by {name}")
    for cluster, share in () if auto else summary.clusters.items():
        typer.echo(f"  {100 * share:.1f} % in cluster {cluster}")
    for kind, number in summary.errors.items():
        typer.echo(f"  {number} with error {kind}")
