"""The front door: ``cascade train | predict | index | serve | inspect | verify | pack | unpack | evaluate | bench``.

Every command imports what it needs when it runs, so that ``cascade --help`` answers at once.
"""

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cascade import CascadeError, __version__
from cascade.cli.index import Weights, index


class OneLine(TyperGroup):
    """Errors meant for a person leave as one line on stderr and exit status 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except CascadeError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=OneLine,
    help="One resident backbone, adapted per image by 1-bit masks.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(index, name="index")
BundlePath = Annotated[Path, typer.Argument(help="A bundle's folder, e.g. model_store/demo/1.")]


class Frontend(StrEnum):
    """Which server is around the engine."""

    torchserve = "torchserve"
    asgi = "asgi"
    ray = "ray"


class ExecutorKind(StrEnum):
    """What may run the backbone, see ``cascade.engine.executors``."""

    auto = "auto"
    plain = "plain"
    folded = "folded"
    bf16 = "bf16"
    onnx = "onnx"


class EmbeddingKind(StrEnum):
    """How ``cascade predict`` stores embeddings."""

    none = "none"
    float16 = "float16"
    float32 = "float32"


class LogLevel(StrEnum):
    """From which level on ``cascade serve`` logs."""

    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


class Machines(StrEnum):
    """Where ``cascade predict`` computes."""

    local = "local"
    ray = "ray"


Chosen = Annotated[ExecutorKind, typer.Option(help="What runs the backbone; auto: the fastest here in float32.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cascade {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """One resident backbone, adapted per image by 1-bit masks."""


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def train(context: typer.Context) -> None:
    """Train a cascade on a folder of images: [bold]cascade train photos/ --out model_store/photos/1[/]

    All options: cascade train --help
    """
    from training.pipeline import command

    command(context.args)


@app.command()
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
    machines: Annotated[
        Machines,
        typer.Option("--engine", help="local: this process; ray: actors on the cluster of RAY_ADDRESS, or here."),
    ] = Machines.local,
    actors: Annotated[int | None, typer.Option(help="ray: engines at most; one a CPU if left out.", min=1)] = None,
    executor: Chosen = ExecutorKind.auto,
    weights: Weights = None,
) -> None:
    """Predict offline: [bold]cascade predict photos/ --out predictions --bundle model_store/demo/1[/]

    Killed and started again with the same options it goes on where it was.

    [bold]cascade predict 'photos/**/*.jpg' more.tar --out predictions.parquet --report report.html[/]

    [bold]cascade predict s3://bucket/shards/*.tar urls.txt --out predictions --embedding float32[/]
    """
    from cascade.engine.engine import Options, load
    from cascade.offline.job import files_of
    from cascade.offline.predict import bar, predict_files
    from cascade.offline.report import check, write

    if report is not None:
        check(report, out)
    engine = load(bundle, weights=weights, executor=executor.value)
    options = Options(mode=mode, labels=labels, neighbors=neighbors)
    numbers: dict[str, Any] = {"batch": batch, "threads": threads, "rows": rows}
    if machines is Machines.ray:
        from handlers.ray.batch_predict import on_ray

        numbers |= {"threads": threads or 1, "run": on_ray(bundle, weights, executor.value, actors)}
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


@app.command()
def serve(
    model_store: Annotated[str, typer.Option(help="Bundles, <name>/<version>: a folder or a URL.")] = "model_store",
    frontend: Annotated[Frontend, typer.Option(help="Which server; asgi and ray speak Open Inference Protocol v2.")] = (
        Frontend.torchserve
    ),
    host: Annotated[str, typer.Option(help="Address to listen on; loopback unless you say otherwise.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Of the predictions; asgi has /metrics on it, too.")] = 8080,
    budget: Annotated[int | None, typer.Option(help="Bytes of materialized masks, for each worker.", min=1)] = None,
    memory: Annotated[int | None, typer.Option(help="Bytes of backbones and bundles, for each worker.", min=1)] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    executor: Chosen = ExecutorKind.auto,
    drain: Annotated[float, typer.Option(help="Seconds for requests in progress, once told to stop.", min=0)] = 8,
    metrics_port: Annotated[int, typer.Option(help="torchserve: of /metrics.")] = 8082,
    management_port: Annotated[int, typer.Option(help="torchserve: of the workers' state, on loopback.")] = 8081,
    workers: Annotated[
        int, typer.Option(help="Processes with a backbone each; ray: at most. asgi has one.", min=1)
    ] = 1,
    api_keys: Annotated[
        Path | None, typer.Option(help="asgi, ray: file of lines BUNDLE SHA256; none: no keys.")
    ] = None,
    max_batch: Annotated[int, typer.Option(help="asgi, ray: images in a pass at most.", min=1)] = 32,
    patience: Annotated[
        float, typer.Option(help="asgi, ray: seconds until the oldest image comes first.", min=0)
    ] = 0.05,
    queue: Annotated[int, typer.Option(help="asgi, ray: images that may wait; 503 for more.", min=1)] = 256,
    index: Annotated[Path | None, typer.Option(help="asgi: of cascade index build, for POST /v1/search.")] = None,
    connections: Annotated[int, typer.Option(help="asgi: connections at a time; 503 for more.", min=1)] = 4096,
    log_level: Annotated[
        LogLevel | None, typer.Option(help="info has a line a request; left out: warning for torchserve, else info.")
    ] = None,
    pin: Annotated[list[str] | None, typer.Option(help="NAME@VERSION for requests that name no version.")] = None,
    poll: Annotated[float, typer.Option(help="Seconds between two looks at the store; 0: never.", min=0)] = 10,
    auth: Annotated[
        bool, typer.Option("--auth/--no-auth", help="torchserve: whether a prediction needs a token.")
    ] = True,
    token_file: Annotated[
        Path | None, typer.Option(help="torchserve: where the token is written, for you alone.")
    ] = None,
) -> None:
    """Serve a model store: [bold]cascade serve --model-store model_store --frontend asgi[/]"""
    if executor is not ExecutorKind.auto:
        os.environ["CASCADE_EXECUTOR"] = executor.value  # the processes that hold engines inherit it
    pins: dict[str, str] = {}
    if pin:
        from cascade.engine.registry import pinned  # which loads torch: the process that supervises does without

        pins = pinned(pin)
    common: dict[str, Any] = {"host": host, "port": port, "budget_bytes": budget, "memory_bytes": memory}
    common |= {"device": device, "drain_timeout": drain, "pins": pins, "poll": poll}
    if frontend is Frontend.ray:
        from handlers.ray.serve import serve as serve_ray

        common |= {
            "max_batch": max_batch,
            "patience": patience,
            "queue": queue,
            "log_level": (log_level or LogLevel.info).value,
        }
        serve_ray(model_store, replicas=workers, api_keys=api_keys, **common)
        return
    if frontend is Frontend.asgi:
        from handlers.asgi.supervisor import serve as serve_asgi

        common |= {"max_batch": max_batch, "patience": patience, "queue": queue, "connections": connections}
        serve_asgi(model_store, api_keys=api_keys, index=index, log_level=(log_level or LogLevel.info).value, **common)
        return
    from handlers.torchserve.entrypoint import serve as serve_torchserve

    ports = {"metrics_port": metrics_port, "management_port": management_port}
    common |= {"auth": auth, "token_file": token_file, "log_level": (log_level or LogLevel.warning).value}
    serve_torchserve(model_store, workers=workers, **common, **ports)


@app.command()
def inspect(bundle: BundlePath) -> None:
    """Show a bundle's card: what it adapts, on what it was trained, and what it is worth."""
    from cascade.bundle.format import read
    from cascade.bundle.inspect import show

    show(read(bundle))


@app.command()
def verify(bundle: BundlePath, weights: Weights = None) -> None:
    """Check a bundle to the last byte, and against its backbone: format, checksums, fingerprint, shapes."""
    from cascade.bundle.format import check, read
    from cascade.model import backbone

    found = read(bundle)
    want = found.card.backbone
    check(found, backbone.load(want.name, want.source, weights))
    typer.echo(f"{bundle} is whole and fits {want.name} ({want.fingerprint[:12]})")


@app.command()
def pack(bundle: BundlePath, file: Annotated[Path, typer.Argument(help="File to write, e.g. demo-1.cascade.")]) -> None:
    """Write a bundle as one small file, to send it: [bold]cascade pack model_store/demo/1 demo-1.cascade[/]"""
    from cascade.bundle import archive

    written = archive.pack(bundle, file)
    typer.echo(f"{written}: {written.stat().st_size / 1e6:.2f} MB; cascade unpack {written.name} makes a bundle of it")


@app.command()
def unpack(
    file: Annotated[Path, typer.Argument(help="What cascade pack has written.")],
    bundle: Annotated[Path, typer.Argument(help="Folder <store>/<name>/<version> to make; must not exist.")],
) -> None:
    """Make a bundle of a packed one: [bold]cascade unpack demo-1.cascade model_store/demo/2[/]"""
    from cascade.bundle import archive

    typer.echo(f"wrote {archive.unpack(file, bundle)}")


@app.command()
def evaluate(
    bundle: BundlePath,
    data: Annotated[
        str,
        typer.Argument(help="Folder with class folders, of which its held-out part counts, or a published data set."),
    ],
    limit: Annotated[int | None, typer.Option(help="Images at most.", min=1)] = None,
    weights: Weights = None,
) -> None:
    """Measure a bundle's label accuracy on other images: [bold]cascade evaluate model_store/demo/1 cifar10[/]"""
    from rich.console import Console

    from training.bundle_accuracy import of_bundle

    Console().print(of_bundle(bundle, data, limit, weights))


@app.command()
def bench(
    bundle: BundlePath,
    batch: Annotated[int, typer.Option(help="Images in a pass.", min=1)] = 8,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.", min=1)] = 7,
    executor: Chosen = ExecutorKind.auto,
    weights: Weights = None,
) -> None:
    """Time one pass in each mode against the plain backbone, and a swap, on this machine."""
    from rich.console import Console

    from cascade.engine.bench import table

    Console().print(table(bundle, batch, rounds, weights, executor.value))


if __name__ == "__main__":
    sys.exit(app())
