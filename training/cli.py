"""The command line of a stage: options, progress bars, and one-line errors."""

import errno
import inspect
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import Field, fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from cascade.cpus import limit_threads
from cascade.errors import CascadeError
from training import distributed
from training.data import dataset
from training.recipe import ABOUT, Recipe

NO_PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST)
EVERY = 10.0  # seconds between two lines of progress without a terminal
RUN = Path("runs/default")
RunFolder = Annotated[Path, typer.Option(help="Folder of the run.")]


class Watch:
    """Progress of every mask: bars on a terminal, otherwise lines."""

    def __init__(self, bar: Bar | None) -> None:
        self.bar, self.tasks = bar, dict[str, TaskID]()
        self._begun: dict[str, tuple[int, float, float]] = {}  # first step, when it was, when a line was printed

    def __call__(self, name: str, step: int, steps: int, loss: float) -> None:
        if self.bar is None:
            return
        if not self.bar.console.is_terminal:
            self._line(name, step, steps, loss)
            return
        if name not in self.tasks:
            self.bar.start()
            self.tasks[name] = self.bar.add_task(name, total=steps, loss=loss)
        self.bar.update(self.tasks[name], completed=step, loss=loss)

    def _line(self, name: str, step: int, steps: int, loss: float) -> None:
        """Without a terminal, print a line every ten seconds, with the estimated time left."""
        assert self.bar is not None
        now = time.monotonic()
        first, begun, told = self._begun.get(name, (step, now, now - EVERY))
        if now - told < EVERY and step < steps:
            self._begun[name] = first, begun, told
            return
        self._begun[name] = first, begun, now
        rate = (step - first) / (now - begun) if step > first else 0.0
        left = f", {(steps - step) / rate / 60:.1f} min left" if rate and step < steps else ""
        self.say(f"{name}: step {step} of {steps}, loss {loss:.4f}{left}")

    def show(self, table: Table) -> None:
        """Print a table."""
        if self.bar is not None:
            self.bar.console.print(table)

    def warn(self, text: str) -> None:
        """Print a warning."""
        self.say(f"[yellow]warning:[/] {text}")

    def say(self, text: str) -> None:
        """Print a line."""
        if self.bar is not None:
            self.bar.console.print(text)


@contextmanager
def watching() -> Iterator[Watch]:
    """Progress bars on the terminal; warnings are printed above them."""
    columns = (
        TextColumn("{task.description:<14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
    )
    bar = Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True))
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: bar.console.print(f"[yellow]warning:[/] {message}")
        try:
            yield Watch(bar)
        finally:
            if bar.tasks:  # the first task starts the bar; an empty bar would leave an empty line
                bar.stop()


@contextmanager
def stage() -> Iterator[Watch]:
    """Context of a stage's command: connects all processes of ``torchrun`` and yields the progress display."""
    limit_threads()
    with watching() as watch, distributed.together():
        yield watch


def start(command: Callable[..., None], arguments: Sequence[str] | None = None, name: str | None = None) -> None:
    """Run the command of a stage; its help is the docstring of its module.

    A user-facing error is one line with exit status 1; wrong options have exit status 2.

    Args:
        command: a function with typer's annotations.
        arguments: those of this process by default.
        name: of the program in its help.
    """
    about = escape(sys.modules[command.__module__].__doc__ or "").replace("\n\n    ", "\n\n\b\n    ")  # keeps its lines
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
    app.command(help=about)(command)
    try:
        app(arguments, prog_name=name)
    except CascadeError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.errno not in NO_PLACE:
            raise
        sys.exit(f"error: {error}: free disk space, or choose writable folders")


def with_recipe(command: Callable[..., None]) -> Callable[..., None]:
    """Add an option for each recipe field to a command, which gets the recipe as its first argument.

    ``DATA`` may be omitted, and is then empty, if the command can find images elsewhere (``from_unknown``).
    """

    @wraps(command)
    def run(**options: Any) -> None:
        recipe = Recipe(**{field.name: options.pop(field.name) for field in fields(Recipe)})
        command(recipe, **options)

    of = {field.name: field for field in fields(Recipe)}
    own = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in inspect.signature(command, eval_str=True).parameters.values()
        if parameter.name != "recipe"
    ]
    optional = any(parameter.name == "from_unknown" for parameter in own)
    parameters = [
        _parameter(of[name], title, text, optional) for title, texts in ABOUT.items() for name, text in texts.items()
    ]
    run.__signature__ = inspect.Signature([*own, *parameters])  # type: ignore[attr-defined]
    return run


def _parameter(field: Field[Any], panel: str, text: str, optional: bool) -> inspect.Parameter:
    """The option for a recipe's field, or the argument ``DATA``."""
    if field.name == "data":
        info: Any = typer.Argument(help=f"{text}: {', '.join(dataset.NAMES)}", metavar="DATA")
    else:
        metavar = "LOW HIGH" if isinstance(field.default, tuple) else None
        flag = f"--{field.name.replace('_', '-')}"  # alone: typer would add --no-... to a bool
        info = typer.Option(flag, help=text, metavar=metavar, rich_help_panel=f"Recipe: {panel}")
    kind = Literal[tuple(choices)] if (choices := choices_of(field.type)) else field.type
    default = field.default if field.name != "data" else "" if optional else inspect.Parameter.empty
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info]
    )


def choices_of(kind: Any) -> list[str]:
    """The strings of a Literal, or of a union of several; empty for other types."""
    return [value for part in get_args(kind) for value in ([part] if isinstance(part, str) else choices_of(part))]
