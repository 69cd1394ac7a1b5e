"""``cascade train``."""

import typer


def train(context: typer.Context) -> None:
    """Train a bundle on a folder of images: [bold]cascade train photos/ --out model_store/photos/1[/]

    All options: cascade train --help
    """
    from training.cli import start
    from training.pipeline import command

    start(command, context.args, "cascade train")
