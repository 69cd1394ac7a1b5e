"""The ``cascade`` command.

Each command imports what it needs when it runs, so that ``cascade --help`` answers at once.
"""

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cascade import CascadeError, __version__
from cascade.cli.adapters import domain, export, import_checkpoint, map_embeddings
from cascade.cli.bundles import inspect, pack, unpack, verify
from cascade.cli.heads import heads
from cascade.cli.index import index
from cascade.cli.measure import bench, evaluate
from cascade.cli.predict import predict
from cascade.cli.serve import serve
from cascade.cli.train import train
from cascade.errors import printable
from cascade.extras import missing


class OneLineErrors(TyperGroup):
    """Prints a CascadeError, or an optional library that is not installed, as one line and exits with status 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except CascadeError as error:
            typer.echo(f"error: {printable(str(error))}", err=True)
            raise typer.Exit(1) from None
        except ModuleNotFoundError as error:
            if (extra := missing(error)) is None:
                raise
            typer.echo(f"error: {extra}", err=True)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=OneLineErrors,
    help="One resident backbone, adapted per image by 1-bit masks.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
# Training parses its own options.
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})(train)
# Only serve reads its options from the environment: --port is CASCADE_SERVE_PORT.
app.command(context_settings={"auto_envvar_prefix": "CASCADE_SERVE"})(serve)
app.command("import")(import_checkpoint)
app.command("map")(map_embeddings)
for command in (domain, export, predict, inspect, verify, pack, unpack, evaluate, bench):
    app.command()(command)
app.add_typer(index, name="index")
app.add_typer(heads, name="heads")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cascade {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """One resident backbone, adapted per image by 1-bit masks."""
    # Read once, when torch is imported. Otherwise PyTorch's threads would spin after each operation and take cores away
    # from ONNX Runtime.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


if __name__ == "__main__":
    sys.exit(app())
