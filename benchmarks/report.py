"""What all benchmarks print: a table, then one JSON object on the last line."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from cascade.executors.choice import processor


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
        return self.value <= float(bound) if sign == "<=" else self.value >= float(bound)


def figure(values: list[float], goal: str | None = None) -> Figure:
    """Median and spread of one value a round."""
    return Figure(median(values), (min(values), max(values)), goal)


def hardware() -> str:
    """The processor's name and the cores that this process may use."""
    return f"{processor()}, {len(os.sched_getaffinity(0))} cores"


def report(benchmark: str, figures: dict[str, Figure], table: Table) -> None:
    """Print both, and keep the JSON under ``benchmarks/results``."""
    Console(width=110).print(table)
    body = {
        name: {"value": round(f.value, 4), "goal": f.goal, "met": f.met, "spread": [round(s, 4) for s in f.spread]}
        for name, f in figures.items()
    }
    line = json.dumps({"benchmark": benchmark, "hardware": hardware(), "figures": body})
    path = Path(__file__).parent / "results" / f"{benchmark}.json"
    path.write_text(line + "\n")
    print(line)
