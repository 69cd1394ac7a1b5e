"""The command line of a stage: options, progress bars, and errors of one line."""

import argparse
import errno
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, get_args

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from cascade.cpus import limit_threads
from cascade.errors import CascadeError
from training import distributed
from training.data import dataset
from training.recipe import ABOUT, Recipe

NO_PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST)


EVERY = 10.0  # seconds between two lines of progress where there is no terminal


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
        """Without a terminal: a line every ten seconds, with the time left by the rate so far."""
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
        """A table for a person."""
        if self.bar is not None:
            self.bar.console.print(table)

    def warn(self, text: str) -> None:
        """A warning for a person."""
        self.say(f"[yellow]warning:[/] {text}")

    def say(self, text: str) -> None:
        """A line for a person."""
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
            if bar.tasks:  # it is started by the first one; an empty bar leaves an empty line
                bar.stop()


class Parser(argparse.ArgumentParser):
    """One that says what is wrong with its options in one line, instead of listing all of them."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; --help shows the options\n")


def parser(about: str | None, *, recipe: bool = False) -> argparse.ArgumentParser:
    """Command-line options of a stage: ``--run``, and with ``recipe`` one option for each of the recipe's fields."""
    out = Parser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.usage = "%(prog)s DATA [options]" if recipe else "%(prog)s [options]"
    folder = None if recipe else Path("runs/default")
    out.add_argument("--run", type=Path, default=folder, help="folder of the run (default runs/NAME-VERSION of --out)")
    if not recipe:
        return out
    of = {f.name: f for f in fields(Recipe)}
    for title, meanings in ABOUT.items():
        group = out.add_argument_group(title)
        for name, meaning in meanings.items():
            flag, default = f"--{name.replace('_', '-')}", of[name].default
            text = (
                f"{meaning} (default {default:g})" if isinstance(default, float) else f"{meaning} (default {default!r})"
            )
            if name == "data":
                group.add_argument(name, metavar="DATA", help=f"{meaning}: {', '.join(dataset.NAMES)}")
            elif isinstance(default, bool):
                group.add_argument(flag, action="store_true", help=meaning)
            elif isinstance(default, tuple):
                group.add_argument(flag, type=float, nargs=2, default=default, metavar=("LOW", "HIGH"), help=text)
            else:
                choices = choices_of(of[name].type) or None
                group.add_argument(flag, type=type(default), default=default, choices=choices, help=text)
    return out


def choices_of(kind: Any) -> list[str]:
    """The strings of a Literal, or of a union of several; empty for other types."""
    return [value for part in get_args(kind) for value in ([part] if isinstance(part, str) else choices_of(part))]


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """The recipe that the options of ``parser(recipe=True)`` give."""
    return Recipe.from_json(vars(arguments))


def main(stage: Any) -> None:
    """Run a stage; an error meant for a person is one line and exit status 1."""
    limit_threads()
    try:
        with watching() as watch, distributed.together():
            stage(watch)
    except CascadeError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.errno not in NO_PLACE:
            raise
        sys.exit(f"error: {error}: make room, or choose folders that can be written to")
