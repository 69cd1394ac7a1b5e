"""Figures, table and plot of ``benchmarks.deferral``, from the results of its cells."""

import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.accuracy import BACKBONES
from benchmarks.report import Figure, hardware

DATASETS = ("cifar10", "groceries", "fashion-mnist")
SMALL, LARGE, BETWEEN = 64, 128, (88, 112)
ADAPTERS = ("frozen", "both", "masks")
LOSE = 0.3  # points

Results = dict[tuple[str, str, str, int], dict[str, Any]]

GOALS = {"deferral_cost": "<= 0.45", "deferral_over_single": "> 0"}


def load(folder: Path) -> tuple[Results, dict[str, dict[str, float]]]:
    """All cells by (dataset, row, backbone, seed), and the passes of each size by backbone."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    costs = {r["backbone"]: {size: float(p) for size, p in r["passes"].items()} for r in found if "passes" in r}
    return {(r["dataset"], r["row"], r["backbone"], r["seed"]): r for r in found if "row" in r}, costs


def cheapest(points: list[list[float]], goal: float) -> float:
    """The smallest share of second passes with an accuracy of at least ``goal``; 1 if only that reaches it."""
    return next((share for share, accuracy in points if accuracy >= goal - 1e-9), 1.0)


def at_cost(points: list[list[float]], share: float) -> float:
    """Accuracy on the frontier at a share of second passes, linear between its points."""
    return float(np.interp(share, [s for s, _ in points], [a for _, a in points]))


def figures(results: Results, costs: dict[str, dict[str, float]], adapter: str) -> dict[str, list[float]]:
    """Values of each figure, one per data set, backbone and seed."""
    single = "both" if adapter == "masks" else adapter
    values: dict[str, list[float]] = {name: [] for name in (*GOALS, "deferral_cost_validated", "deferral_lost")}
    for (dataset, row, backbone, seed), r in results.items():
        if row != f"{adapter}-{SMALL}-{LARGE}" or backbone not in costs:
            continue
        full = costs[backbone][str(LARGE)]
        values["deferral_cost"].append((1 + cheapest(r["frontier"], r["full"] - LOSE) * full) / full)
        values["deferral_cost_validated"].append((1 + r["share"] * full) / full)
        values["deferral_lost"].append(r["full"] - r["accuracy"])
        for size in BETWEEN:
            if (control := results.get((dataset, f"{single}-{size}", backbone, seed))) is not None:
                share = (costs[backbone][str(size)] - 1) / full
                values["deferral_over_single"].append(at_cost(r["frontier"], share) - control["accuracy"])
    return values


def summary(results: Results, costs: dict[str, dict[str, float]], adapter: str) -> dict[str, dict[str, Any]]:
    """Each figure as JSON: mean, deviation, number of cells, and whether its goal is met.

    ``deferral_over_single`` must be two deviations above 0.
    """
    out: dict[str, dict[str, Any]] = {}
    for name, own in figures(results, costs, adapter).items():
        goal = GOALS.get(name)
        if not own:
            out[name] = {"value": "not measured", "goal": goal, "met": None}
            continue
        deviation = stdev(own) if len(own) > 1 else None
        least = mean(own) - 2 * deviation if name == "deferral_over_single" and deviation is not None else mean(own)
        decided = name != "deferral_over_single" or deviation is not None
        met = Figure(least, (min(own), max(own)), goal).met if decided else None
        out[name] = {"value": round(mean(own), 4), "sd": deviation and round(deviation, 4), "cells": len(own)}
        out[name] |= {"spread": [round(min(own), 4), round(max(own), 4)], "goal": goal, "met": met}
    return out


def report(folder: Path, plot_to: Path | None) -> None:
    """The table, the plot, and one JSON object with all figures as the last line."""
    results, costs = load(folder)
    table = Table("data", "row", "backbone", "seed", "accuracy %", "passes", "asked again %", "fast %", "full %")
    for (dataset, row, backbone, seed), r in results.items():
        cost = cost_of(row, r, costs.get(backbone, {}))
        again = [f"{100 * r['share']:.1f}", f"{r['fast']:.1f}", f"{r['full']:.1f}"] if "share" in r else [""] * 3
        shown = "" if cost is None else f"{cost:.2f}"
        table.add_row(dataset, row, backbone, str(seed), f"{r['accuracy']:.1f}", shown, *again)
    Console(width=118).print(table)
    if plot_to is not None:
        plot(results, costs, plot_to)
    body = {f"figures_{adapter}": summary(results, costs, adapter) for adapter in ADAPTERS}
    body["figures"] = body.pop("figures_both")
    head = {"benchmark": "deferral", "hardware": hardware(), "passes": costs, "cells": len(results)}
    line = json.dumps(head | body)
    folder.with_suffix(".json").write_text(line + "\n")
    print(line)


def cost_of(row: str, result: dict[str, Any], costs: dict[str, float]) -> float | None:
    """Cost in passes of the small size; that of a pair at its threshold. None if the times were not measured."""
    _, *sizes = row.split("-")
    if not set(sizes) <= costs.keys():
        return None
    return costs[sizes[0]] if len(sizes) == 1 else 1 + result["share"] * costs[sizes[1]]


def plot(results: Results, costs: dict[str, dict[str, float]], path: Path) -> None:
    """Accuracy against cost, one panel per data set (first backbone, seed 0): frontiers are lines, sizes are points."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "deferral"
    from matplotlib import pyplot

    backbone = next(iter(BACKBONES))
    shown = {(d, row): r for (d, row, b, seed), r in results.items() if (b, seed) == (backbone, 0)}
    datasets = [dataset for dataset in DATASETS if any(d == dataset for d, _ in shown)]
    if not datasets or backbone not in costs:
        return
    cost = costs[backbone]
    figure, panels = pyplot.subplots(1, len(datasets), figsize=(3.6 * len(datasets), 3.6), squeeze=False)
    for axes, dataset in zip(panels[0], datasets, strict=True):
        for adapter, color in zip(ADAPTERS, ("tab:gray", "tab:blue", "tab:green"), strict=True):
            if (found := shown.get((dataset, f"{adapter}-{SMALL}-{LARGE}"))) is not None:
                x = [1 + share * cost[str(LARGE)] for share, _ in found["frontier"]]
                axes.plot(x, [a for _, a in found["frontier"]], color=color, label=f"{adapter}, asked again")
                axes.plot([cost_of(f"{adapter}-{SMALL}-{LARGE}", found, cost)], [found["accuracy"]], "*", color=color)
            own = [(s, shown.get((dataset, f"{adapter}-{s}"))) for s in (SMALL, *BETWEEN, LARGE)]
            single = [(cost[str(s)], r["accuracy"]) for s, r in own if r is not None]
            if adapter == "frozen" and found is not None:
                single.append((cost[str(LARGE)], found["full"]))
            if single:
                points = [c for c, _ in single], [a for _, a in single]
                axes.plot(*points, "o:", color=color, label=f"{adapter}, one size")
        axes.set(title=dataset, xlabel=f"cost in passes at {SMALL} px", ylabel="accuracy on test images, %")
    named = {label: h for axes in panels[0] for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named, frameon=False, fontsize=8, ncols=4, loc="lower center")
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
