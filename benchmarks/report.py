"""The output of all benchmarks: tables, then one JSON object on the last line."""

import json
import operator
import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from cascade import __version__
from cascade.engine.executors.selection import processor

PACKAGES = ("torch", "timm", "onnxruntime", "onnxruntime-gpu", "numba", "numpy", "pillow", "pyarrow")
VARIABLES = ("CASCADE_EXECUTOR", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "OPENBLAS_NUM_THREADS", "TRITON_INTERPRET")
LOAD = [round(load, 2) for load in os.getloadavg()]  # 1, 5 and 15 minutes before the benchmark began


@dataclass(frozen=True)
class Figure:
    """One measured number.

    Attributes:
        value: the median. spread: minimum and maximum over the rounds. goal: e.g. ``<= 1.5``, or None.
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
    """Median and spread of one value per round."""
    return Figure(median(values), (min(values), max(values)), goal)


def single(value: float, goal: str | None = None) -> Figure:
    """A value measured once, such as bytes."""
    return Figure(value, (value, value), goal)


class Rows:
    """A table with name, median, minimum, maximum, and memory if it was measured."""

    def __init__(self, title: str) -> None:
        self.table = Table("what", "median", "least", "most", "unit", "MB", title=title)

    def add(self, what: str, found: Figure, unit: str, memory: int | None = None) -> None:
        numbers = (f"{v:.3g}" if v < 1 else f"{v:.1f}" for v in (found.value, *found.spread))
        self.table.add_row(what, *numbers, unit, "" if memory is None else f"{memory / 1e6:.0f}")


def hardware() -> str:
    """The processor, the cores that this process may use, and the GPU, if any."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{processor()}, {len(os.sched_getaffinity(0))} cores{gpu}"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that determine the speed of a pass."""
    installed = {"python": platform.python_version(), "cascade-vision": __version__}  # installed may be an older one
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed


def settings() -> dict[str, Any]:
    """Settings and environment that affect times: threads, executor override, load before the start."""
    environment = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    return {"threads": torch.get_num_threads(), "environment": environment, "load": LOAD}


def report(
    benchmark: str,
    figures: dict[str, Figure],
    *tables: Table,
    executor: str | None,
    out: Path | None = None,
    details: dict[str, Any] | None = None,
) -> None:
    """Print the tables and a summary of the figures, and write them as JSON.

    Args:
        executor: class name of the executor that was measured; None where the benchmark runs none.
        out: file of the JSON; by default below ``benchmarks/results``.
        details: what else the JSON holds, beside the figures.
    """
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
    head = {"benchmark": benchmark, "hardware": hardware(), "versions": versions(), "executor": executor}
    line = json.dumps(head | settings() | {"figures": body} | (details or {}))
    path = out or Path(__file__).parent / "results" / f"{benchmark}.json"
    path.write_text(line + "\n")
    print(line)
