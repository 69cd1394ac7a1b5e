"""What all benchmarks print: a table, then one JSON object on the last line."""

import json
import operator
import os
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from cascade.engine.executors.selection import processor


@dataclass(frozen=True)
class Figure:
    """One measured number.

    Attributes:
        value: the median. spread: least and most over the rounds. goal: e.g. ``<= 1.5``, None where none was set.
    """

    value: float
    spread: tuple[float, float]
    goal: str | None = None

    @property
    def met(self) -> bool | None:
        if self.goal is None:
            return None
        sign, bound = self.goal.split()
        return {"<=": operator.le, ">=": operator.ge, ">": operator.gt}[sign](self.value, float(bound))


def figure(values: list[float], goal: str | None = None) -> Figure:
    """Median and spread of one value a round."""
    return Figure(median(values), (min(values), max(values)), goal)


def single(value: float, goal: str | None = None) -> Figure:
    """Something that was measured once, bytes say."""
    return Figure(value, (value, value), goal)


class Rows:
    """The table that a person reads: what, median, least, most, and memory where it was measured."""

    def __init__(self, title: str) -> None:
        self.table = Table("what", "median", "least", "most", "unit", "MB", title=title)

    def add(self, what: str, found: Figure, unit: str, memory: int | None = None) -> None:
        numbers = (f"{v:.3g}" if v < 1 else f"{v:.1f}" for v in (found.value, *found.spread))
        self.table.add_row(what, *numbers, unit, "" if memory is None else f"{memory / 1e6:.0f}")


def hardware() -> str:
    """The processor's name, the cores that this process may use, and the GPU where there is one."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{processor()}, {len(os.sched_getaffinity(0))} cores{gpu}"


def report(benchmark: str, figures: dict[str, Figure], *tables: Table, out: Path | None = None) -> None:
    """Print the tables and one of all figures, and keep the JSON: at ``out``, or under ``benchmarks/results``."""
    summary = Table("figure", "value", "spread", "goal", "met", title=f"{benchmark} on {hardware()}")
    for name, f in figures.items():
        met = {True: "yes", False: "NO", None: ""}[f.met]
        summary.add_row(name, f"{f.value:.3f}", f"{f.spread[0]:.3f}-{f.spread[1]:.3f}", f.goal or "", met)
    for table in (*tables, summary):
        Console(width=118).print(table)
    body = {
        name: {"value": round(f.value, 4), "goal": f.goal, "met": f.met, "spread": [round(s, 4) for s in f.spread]}
        for name, f in figures.items()
    }
    line = json.dumps({"benchmark": benchmark, "hardware": hardware(), "figures": body})
    path = out or Path(__file__).parent / "results" / f"{benchmark}.json"
    path.write_text(line + "\n")
    print(line)
