"""``cascade evaluate`` and ``cascade bench``: the accuracy of a bundle, and its speed."""

from typing import Annotated

import typer

from cascade.cli.options import BundlePath, Executor, ExecutorKind, Weights


def evaluate(
    bundle: BundlePath,
    data: Annotated[
        str,
        typer.Argument(help="Folder with class folders (its held-out part is used), or a published data set."),
    ],
    limit: Annotated[int | None, typer.Option(help="Maximum number of images.", min=1)] = None,
    weights: Weights = None,
) -> None:
    """Measure a bundle's label accuracy on a data set: [bold]cascade evaluate model_store/paper/1 cifar10[/]"""
    from rich.console import Console

    from training.bundle_accuracy import of_bundle

    Console().print(of_bundle(bundle, data, limit, weights))


def bench(
    bundle: BundlePath,
    batch: Annotated[int, typer.Option(help="Images per pass.", min=1)] = 8,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.", min=1)] = 7,
    executor: Executor = ExecutorKind.auto,
    weights: Weights = None,
) -> None:
    """Time a swap, and one pass in each mode against the plain backbone, on this machine."""
    from rich.console import Console

    from cascade.engine.bench import table

    Console().print(table(bundle, batch, rounds, weights, executor.value))
