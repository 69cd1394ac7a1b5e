"""Tables, figures and the plot of ``benchmarks.domains``: ``docs/domains.svg``, mean accuracy by number of domains."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.table import Table

from benchmarks.domain_controls import Shares
from benchmarks.report import Figure, figure, report, single

NAMED, AUTO, JOINTLY = "own bundle, named (oracle)", "own bundle, dispatched", "one bundle, trained jointly"
IN_TURN, COPIES = "one mask, trained on each domain in turn", "fine-tuned copies, named"
FROZEN, RANPAC = "heads on the frozen backbone, named", "RanPAC"
ROUTED, BETWEEN, UNKNOWN = "sent to its bundle", "sent to its data set", "AUROC as unknown"
METHODS = (NAMED, AUTO, JOINTLY, IN_TURN, COPIES, FROZEN, RANPAC)
SEARCH = "dispatch over 1,000 bundles"
DOCS = Path(__file__).parents[1] / "docs"


@dataclass(frozen=True)
class Measured:
    """What one seed gave, by method.

    Attributes:
        growing: after each arrival, the accuracy on each domain so far.
        final: shares on each domain that are only measured when all have arrived.
        bytes: that each domain adds. seconds: from the images of each domain to the first answer.
    """

    growing: dict[str, list[Shares]]
    final: dict[str, Shares]
    bytes: dict[str, list[int]]
    seconds: dict[str, list[float]]

    def shares(self, way: str) -> Shares:
        """On each domain, when all have arrived."""
        return self.growing[way][-1] if way in self.growing else self.final[way]

    def means(self, way: str) -> list[float]:
        """Mean accuracy over the domains so far, after each arrival."""
        return [mean(shares.values()) for shares in self.growing[way]]


def show(
    name: str,
    title: str,
    found: Sequence[Measured],
    passes: dict[str, list[float]],
    most_passes: str,
    forgotten: int,
    executor: str,
) -> None:
    """Print the tables, write ``benchmarks/results/NAME.json`` and draw ``docs/NAME.svg``.

    Args:
        passes: time of a mixed batch by method, in plain passes, and of ``SEARCH``. most_passes: the goal.
        forgotten: answers of older bundles that changed.
    """
    tables = [accuracies(found, title), arrivals(found), prices(found, passes)]
    values = figures(found, passes, most_passes) | {"forgotten": single(forgotten, "<= 0")}
    report(name, values, *tables, executor=executor, details={"seeds": [_rounded(asdict(each)) for each in found]})
    plot(found, DOCS / f"{name}.svg")


def accuracies(found: Sequence[Measured], title: str) -> Table:
    """Accuracy of each method, and the shares of routing, when all domains have arrived."""
    table = Table("accuracy %", "mean", *found[0].shares(AUTO), title=title)
    for way in (*METHODS, ROUTED, BETWEEN, UNKNOWN):
        columns = zip(*(each.shares(way).values() for each in found), strict=True)
        table.add_row(way, _percent(mean(_means(found, way))), *(_percent(mean(column)) for column in columns))
    return table


def arrivals(found: Sequence[Measured]) -> Table:
    """Mean accuracy over the domains so far, after each arrival."""
    table = Table("mean accuracy %, after", *found[0].shares(AUTO))
    for way in METHODS:
        if way in found[0].growing:
            table.add_row(way, *(_percent(mean(column)) for column in _grown(found, way)))
    return table


def prices(found: Sequence[Measured], passes: dict[str, list[float]]) -> Table:
    """What each method costs."""
    table = Table("cost", "passes, by time", "KB a domain", "seconds from images to served")
    for way in METHODS:
        time = f"{figure(passes[way]).value:.2f}" if way in passes else "-"
        size = f"{mean(b for each in found for b in each.bytes[way]) / 1000:,.0f}" if way in found[0].bytes else "-"
        spent = [s for each in found for s in each.seconds.get(way, [])]
        table.add_row(way, time, size, f"{figure(spent).value:.0f}" if spent else "-")
    return table


def figures(found: Sequence[Measured], passes: dict[str, list[float]], most_passes: str) -> dict[str, Figure]:
    """The figures and their goals."""
    named = zip(_means(found, AUTO), _means(found, NAMED), strict=True)
    return {
        "route_accuracy": figure([*_means(found, ROUTED)], ">= 0.98"),
        "route_accuracy_between_data_sets": figure([*_means(found, BETWEEN)], ">= 0.98"),
        "auto_over_oracle": figure([a / b for a, b in named], ">= 0.98"),
        **_over("joint", found, JOINTLY, ">= 0"),
        **_over("ranpac", found, RANPAC, "> 0"),
        **_over("sequential", found, IN_TURN, ">= 20"),
        **_over("fine_tuned_named", found, COPIES),
        **_over("frozen_named", found, FROZEN),
        "auto_passes": figure(passes[AUTO], most_passes),
        "named_passes": figure(passes[NAMED]),
        "unknown_auroc": figure([*_means(found, UNKNOWN)], ">= 0.95"),
        "dispatch_share_1000": figure(passes[SEARCH], "<= 0.02"),
        "bytes_a_domain": figure([b for each in found for b in each.bytes[AUTO]]),
        "seconds_to_served": figure([s for each in found for s in each.seconds[AUTO]]),
    }


def _over(short: str, found: Sequence[Measured], way: str, goal: str | None = None) -> dict[str, Figure]:
    """Points by which dispatched bundles are better, and with several seeds in standard deviations over these."""
    points = [100 * (a - b) for a, b in zip(_means(found, AUTO), _means(found, way), strict=True)]
    out = {f"auto_over_{short}": figure(points, goal)}
    if len(points) > 1:
        out[f"auto_over_{short}_sd"] = single(mean(points) / max(stdev(points), 1e-9), "> 2" if goal else None)
    return out


def plot(found: Sequence[Measured], path: Path) -> None:
    """Mean accuracy by the number of domains."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = path.stem
    from matplotlib import pyplot

    canvas, axes = pyplot.subplots(figsize=(7, 4))
    for way in METHODS:
        style = "o-" if way == AUTO else ".--"
        if way in found[0].growing:
            values = [100 * mean(column) for column in _grown(found, way)]
            axes.plot(range(1, len(values) + 1), values, style, label=way)
    last = len(found[0].shares(AUTO))
    axes.plot([last], [100 * mean(_means(found, JOINTLY))], "k*", markersize=10, label=JOINTLY)
    axes.set(xlabel="domains", ylabel="mean accuracy on the domains so far, %", xticks=range(1, last + 1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    canvas.tight_layout()
    canvas.savefig(path, metadata={"Date": None})
    pyplot.close(canvas)


def _means(found: Sequence[Measured], way: str) -> Iterator[float]:
    """The mean over the domains, for each seed."""
    return (mean(each.shares(way).values()) for each in found)


def _grown(found: Sequence[Measured], way: str) -> Iterator[tuple[float, ...]]:
    """After each arrival, the mean over the domains so far, for each seed."""
    return zip(*(each.means(way) for each in found), strict=True)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _rounded(value: Any) -> Any:
    """Numbers with four digits after the point, at any depth."""
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return round(value, 4) if isinstance(value, float) else value
