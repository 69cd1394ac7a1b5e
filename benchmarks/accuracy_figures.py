"""Figures of ``benchmarks.accuracy``, and ``docs/accuracy.svg``: accuracy against the bytes of a customer's model."""

import json
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.report import Figure, hardware

Results = dict[tuple[str, str, str, int], dict[str, Any]]

RESULTS = Path(__file__).parent / "results" / "accuracy"
PLOT = Path(__file__).parents[1] / "docs" / "accuracy.svg"
DRAWN = {
    "frozen": ("linear head on the frozen backbone", "s"),
    "channels": ("scales and shifts", "^"),
    "both": ("1-bit mask, scales and shifts", "o"),
    "delta-distilled": ("1-bit delta of the copy", "v"),
    "full": ("fine-tuned copy", "D"),
}
"""Rows of the plot: title and marker."""

GOALS = {
    "mask_share_of_gain": ">= 0.95",
    "mask_over_head": ">= 8",
    "bits_over_channels": "> 0",
    "bytes_of_copy": "<= 0.01667",
    "delta_bytes_of_copy": "<= 0.03571",
    "delta_loss": "<= 1.0",
    "delta_loss_distilled": "<= 0.5",
    "unlabeled_over_frozen_cifar10": ">= 12",
    "unlabeled_over_frozen_fashion": ">= 2",
    "unlabeled_worst": ">= 1",
    "unlabeled_share_of_teacher": ">= 0.8",
    "unlabeled_over_lightly": ">= 0",
}
GAP = 3.0  # points between teacher and frozen backbone, below which a share of them says nothing


def load() -> Results:
    """All measured cells, by (dataset, row, backbone, seed)."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    return {(r["dataset"], r["row"], r["backbone"], r["seed"]): r for r in found}


def figures(results: Results) -> dict[str, float | None]:
    """Each figure of ``GOALS``: a mean over data sets and backbones, of means over seeds; None where not measured."""
    groups: dict[tuple[str, str, int], dict[str, dict[str, Any]]] = {}
    for (dataset, row, backbone, seed), result in results.items():
        groups.setdefault((dataset, backbone, seed), {})[row] = result

    def average(rows: tuple[str, ...], value: Any, only: str = "") -> list[float]:
        seeds: dict[tuple[str, str], list[float]] = {}
        for (dataset, backbone, _), group in groups.items():
            complete = dataset.startswith(only) and all(row in group for row in rows)
            found = value(*(group[row] for row in rows)) if complete else None
            if found is not None:
                seeds.setdefault((dataset, backbone), []).append(found)
        return [mean(values) for values in seeds.values()]

    def over(a: dict[str, Any], b: dict[str, Any]) -> float:
        return float(a["accuracy"] - b["accuracy"])

    def share(student: dict[str, Any], frozen: dict[str, Any], teacher: dict[str, Any]) -> float | None:
        gap = over(teacher, frozen)
        return over(student, frozen) / gap if gap >= GAP else None

    unlabeled = ("unlabeled-distilled", "unlabeled-frozen")
    values = {
        "mask_share_of_gain": average(("both", "frozen", "full"), lambda m, h, f: over(m, h) / over(f, h)),
        "mask_over_head": average(("both", "frozen"), over),
        "bits_over_channels": average(("both", "channels"), over),
        "delta_loss": average(("full", "delta"), over),
        "delta_loss_distilled": average(("full", "delta-distilled"), over),
        "delta_bytes_of_copy": average(("delta", "full"), lambda m, f: m["bytes"] / f["bytes"]),
        "bytes_of_copy": average(("both", "full"), lambda m, f: m["bytes"] / f["bytes"]),
        "unlabeled_over_frozen_cifar10": average(unlabeled, over, "cifar10"),
        "unlabeled_over_frozen_fashion": average(unlabeled, over, "fashion"),
        "unlabeled_share_of_teacher": average((*unlabeled, "unlabeled-teacher"), share),
        "unlabeled_over_lightly": average(("unlabeled-distilled", "unlabeled-lightly"), over),
    }
    out: dict[str, float | None] = {name: mean(v) if v else None for name, v in values.items()}
    gains = average(unlabeled, over)
    out["unlabeled_worst"] = min(gains) if gains else None
    return {name: out.get(name) for name in GOALS}


def report(results: Results) -> None:
    """The table, the plot, and one JSON object with all figures as the last line."""
    table = Table("data", "row", "backbone", "seed", "accuracy %", "KB to ship", "steps", "seconds", "images/s mixed")
    for (dataset, row, backbone, seed), r in results.items():
        size = f"{r['bytes'] / 1000:,.0f}" if r["bytes"] else ""
        about = dataset, row, backbone, str(seed), f"{r['accuracy']:.1f}", size, str(r["steps"])
        table.add_row(*about, f"{r['seconds']:.0f}", mixed_rate(row, backbone))
    Console(width=118).print(table)
    plot(results, PLOT)
    body = {}
    for name, value in figures(results).items():
        met = None if value is None else Figure(value, (value, value), GOALS[name]).met
        body[name] = {"value": "not measured" if value is None else round(value, 4), "goal": GOALS[name], "met": met}
    line = json.dumps({"benchmark": "accuracy", "hardware": hardware(), "cells": len(results), "figures": body})
    (RESULTS.parent / "accuracy.json").write_text(line + "\n")
    print(line)


def mixed_name(backbone: str) -> str:
    """Name of the result of ``benchmarks.accuracy_throughput``."""
    return f"accuracy-mixed-{backbone}"


def mixed_rate(row: str, backbone: str) -> str:
    """Images per second if 20 such models are served mixed (``benchmarks.accuracy_throughput``); empty if unknown."""
    path = RESULTS.parent / f"{mixed_name(backbone)}.json"
    rates = json.loads(path.read_text())["figures"] if path.exists() else {}
    rate = rates.get("delta" if row.startswith("delta") else row)
    return f"{rate['value']:,.0f}" if rate else ""


def plot(results: Results, path: Path) -> None:
    """Accuracy against model size: a color for each data set, a marker for each kind of model (seed 0)."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "accuracy"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    drawn = {k: r for k, r in results.items() if k[1] in DRAWN and k[3] == 0 and k[2] == "tf_efficientnet_lite0"}
    for n, dataset in enumerate(dict.fromkeys(key[0] for key in drawn)):
        own = {row: r for (d, row, _, _), r in drawn.items() if d == dataset}
        line = sorted((r["bytes"] / 1000, r["accuracy"]) for r in own.values())
        axes.plot(*zip(*line, strict=True), "-", color=f"C{n}", alpha=0.4)
        for row, r in own.items():
            axes.plot(r["bytes"] / 1000, r["accuracy"], DRAWN[row][1], color=f"C{n}", markersize=7)
        size, accuracy = line[0]
        text = f"{dataset}, {next(iter(own.values()))['images']:,} images"
        axes.annotate(text, (size, accuracy), xytext=(8, -12), textcoords="offset points", color=f"C{n}", fontsize=8)
    for title, marker in DRAWN.values():
        axes.plot([], [], marker, color="gray", label=title)
    axes.set(xscale="log", xlabel="KB to ship for one customer (zstd)", ylabel="accuracy on held-out images, %")
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center right", bbox_to_anchor=(1, 0.45))
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
