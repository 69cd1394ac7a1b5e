"""The output of an experiment: tables as Markdown and JSON with mean and standard deviation over seeds, and figures."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cascade import atomic
from cascade.errors import CascadeError

Curve = tuple[Sequence[float], Sequence[float]]  # x and y


@dataclass
class Table:
    """One table of the paper, or the numbers of a figure.

    Attributes:
        title: what it shows, and which of the paper's tables it is.
        cells: row -> column -> one value per seed.
        published: row -> column -> the paper's value, in the same unit; shown next to ours.
        digits: after the decimal point.
    """

    title: str
    cells: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    published: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    digits: int = 1

    def add(self, row: str, values: Mapping[str, float]) -> None:
        """Add one seed's values of a row, by column."""
        for column, value in values.items():
            self.cells.setdefault(row, {}).setdefault(column, []).append(float(value))

    def mean(self, row: str, column: str) -> float:
        return float(np.mean(self.cells[row][column]))

    def markdown(self) -> str:
        """A Markdown table; the paper's values in brackets."""
        columns = list(dict.fromkeys(c for row in self.cells.values() for c in row))
        lines = [f"**{self.title}**", "", "| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for name, row in self.cells.items():
            cells = [self._cell(row.get(c, []), self.published.get(name, {}).get(c)) for c in columns]
            lines.append("| " + " | ".join([name, *cells]) + " |")
        return "\n".join(lines) + "\n"

    def _cell(self, values: list[float], published: float | None) -> str:
        text = f"{np.mean(values):.{self.digits}f}" if values else "-"
        if len(values) > 1:
            text += f" ± {np.std(values, ddof=1):.{self.digits}f}"
        return text + ("" if published is None else f" ({published:.{self.digits}f})")

    def json(self) -> dict[str, Any]:
        """Mean, sample standard deviation and all values of each cell."""
        rows = {
            name: {
                c: {
                    "mean": round(float(np.mean(v)), 6),
                    "std": round(float(np.std(v, ddof=1)), 6) if len(v) > 1 else None,
                    "values": [round(x, 6) for x in v],
                }
                for c, v in row.items()
            }
            for name, row in self.cells.items()
        }
        return {"title": self.title, "rows": rows, "published": self.published}


def write(path: Path, tables: Sequence[Table], about: Mapping[str, Any], notes: Sequence[str]) -> str:
    """Write ``path``.md and ``path``.json atomically; returns the Markdown."""
    settings = ", ".join(f"{k} {v}" for k, v in about.items() if not isinstance(v, dict))
    parts = [t.markdown() for t in tables] + [f"{settings}\n"] + [f"- {note}\n" for note in notes]
    text = "\n".join(parts)
    body = {**about, "tables": [t.json() for t in tables], "notes": list(notes)}
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix, content in ((".md", text), (".json", json.dumps(body, indent=1) + "\n")):
        with atomic.file(path.with_name(path.name + suffix)) as beside:
            beside.write_text(content)
    return text


def plots() -> Any:
    """matplotlib's pyplot without a display, imported only when a figure is drawn."""
    try:
        import matplotlib
    except ImportError as error:
        raise CascadeError("figures need matplotlib: pip install 'cascade-vision[paper]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw(path: Path, panels: Mapping[str, Mapping[str, Curve]], x: str, y: str, style: str = "-") -> None:
    """A PNG of panels side by side, each with named curves."""
    plt = plots()
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 3.8), squeeze=False)
    for axis, (title, curves) in zip(axes[0], panels.items(), strict=True):
        for label, (xs, ys) in curves.items():
            axis.plot(xs, ys, style, label=label)
        axis.set(title=title, xlabel=x, ylabel=y)
        axis.legend(fontsize=8)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Write the figure as PNG and close it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    with atomic.file(path) as beside:
        figure.savefig(beside, format="png", dpi=110)
    plots().close(figure)
