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
TOP2, ROUTED_TOP2 = "own bundle, dispatched with top2", "sent to its bundle with top2"
IN_TURN, COPIES = "one mask, trained on each domain in turn", "fine-tuned copies, named"
FROZEN, RANPAC = "heads on the frozen backbone, named", "RanPAC"
ROUTED, BETWEEN, UNKNOWN = "sent to its bundle", "sent to its data set", "AUROC as unknown"
METHODS = (NAMED, AUTO, TOP2, JOINTLY, IN_TURN, COPIES, FROZEN, RANPAC)
SEARCH = "dispatch over 1,000 bundles"
SEARCH_RESNET50 = f"{SEARCH} of a ResNet-50 at 224 px"
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

    def shares(self, method: str) -> Shares:
        """On each domain, when all have arrived."""
        return self.growing[method][-1] if method in self.growing else self.final[method]

    def means(self, method: str) -> list[float]:
        """Mean accuracy over the domains so far, after each arrival."""
        return [mean(shares.values()) for shares in self.growing[method]]


def show(
    name: str,
    title: str,
    seeds: Sequence[Measured],
    passes: dict[str, list[float]],
    most_passes: str,
    forgotten: int,
    executor: str,
) -> None:
    """Print the tables, write ``benchmarks/results/NAME.json`` and draw ``docs/NAME.svg``.

    Args:
        passes: time of a mixed batch by method, in plain passes, and of each search. most_passes: the goal.
        forgotten: answers of older bundles that changed.
    """
    tables = [accuracies(seeds, title), arrivals(seeds), prices(seeds, passes)]
    values = figures(seeds, passes, most_passes) | {"forgotten": single(forgotten, "<= 0")}
    report(name, values, *tables, executor=executor, details={"seeds": [_rounded(asdict(each)) for each in seeds]})
    plot(seeds, DOCS / f"{name}.svg")


def accuracies(seeds: Sequence[Measured], title: str) -> Table:
    """Accuracy of each method, and the shares of routing, when all domains have arrived."""
    table = Table("accuracy %", "mean", *seeds[0].shares(AUTO), title=title)
    for method in (*METHODS, ROUTED, ROUTED_TOP2, BETWEEN, UNKNOWN):
        columns = zip(*(each.shares(method).values() for each in seeds), strict=True)
        table.add_row(method, _percent(mean(_means(seeds, method))), *(_percent(mean(column)) for column in columns))
    return table


def arrivals(seeds: Sequence[Measured]) -> Table:
    """Mean accuracy over the domains so far, after each arrival."""
    table = Table("mean accuracy %, after", *seeds[0].shares(AUTO))
    for method in METHODS:
        if method in seeds[0].growing:
            table.add_row(method, *(_percent(mean(column)) for column in _grown(seeds, method)))
    return table


def prices(seeds: Sequence[Measured], passes: dict[str, list[float]]) -> Table:
    """What each method costs."""
    table = Table("cost", "passes, by time", "KB a domain", "seconds from images to served")
    for method in METHODS:
        time = f"{figure(passes[method]).value:.2f}" if method in passes else "-"
        sizes = [b for each in seeds for b in each.bytes.get(method, [])]
        spent = [s for each in seeds for s in each.seconds.get(method, [])]
        size = f"{mean(sizes) / 1000:,.0f}" if sizes else "-"
        table.add_row(method, time, size, f"{figure(spent).value:.0f}" if spent else "-")
    return table


def figures(seeds: Sequence[Measured], passes: dict[str, list[float]], most_passes: str) -> dict[str, Figure]:
    """The figures and their goals; dispatch is by ``image``, except for those of ``top2``."""

    def over_oracle(method: str) -> list[float]:
        return [a / b for a, b in zip(_means(seeds, method), _means(seeds, NAMED), strict=True)]

    return {
        "route_accuracy": figure([*_means(seeds, ROUTED)], ">= 0.98"),
        "route_accuracy_between_data_sets": figure([*_means(seeds, BETWEEN)], ">= 0.98"),
        "auto_over_oracle": figure(over_oracle(AUTO), ">= 0.98"),
        "top2_route_accuracy": figure([*_means(seeds, ROUTED_TOP2)], ">= 0.98"),
        "top2_over_oracle": figure(over_oracle(TOP2), ">= 0.98"),
        **_over("joint", seeds, JOINTLY, ">= 0"),
        **_over("ranpac", seeds, RANPAC, "> 0"),
        **_over("sequential", seeds, IN_TURN, ">= 20"),
        **_over("fine_tuned_named", seeds, COPIES),
        **_over("frozen_named", seeds, FROZEN),
        "auto_passes": figure(passes[AUTO], most_passes),
        "top2_passes": figure(passes[TOP2], most_passes),
        "named_passes": figure(passes[NAMED]),
        "unknown_auroc": figure([*_means(seeds, UNKNOWN)], ">= 0.95"),
        "dispatch_share_1000": figure(passes[SEARCH], "<= 0.02"),
        "dispatch_share_1000_resnet50": figure(passes[SEARCH_RESNET50], "<= 0.02"),
        "bytes_a_domain": figure([b for each in seeds for b in each.bytes[AUTO]]),
        "seconds_to_served": figure([s for each in seeds for s in each.seconds[AUTO]]),
    }


def _over(short: str, seeds: Sequence[Measured], method: str, goal: str | None = None) -> dict[str, Figure]:
    """Points by which dispatched bundles are better, and with several seeds in standard deviations over these."""
    points = [100 * (a - b) for a, b in zip(_means(seeds, AUTO), _means(seeds, method), strict=True)]
    out = {f"auto_over_{short}": figure(points, goal)}
    if len(points) > 1:
        out[f"auto_over_{short}_sd"] = single(mean(points) / max(stdev(points), 1e-9), "> 2" if goal else None)
    return out


def plot(seeds: Sequence[Measured], path: Path) -> None:
    """Mean accuracy by the number of domains."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = path.stem
    from matplotlib import pyplot

    canvas, axes = pyplot.subplots(figsize=(7, 4))
    for method in METHODS:
        style = "o-" if method == AUTO else ".--"
        if method in seeds[0].growing:
            values = [100 * mean(column) for column in _grown(seeds, method)]
            axes.plot(range(1, len(values) + 1), values, style, label=method)
    last = len(seeds[0].shares(AUTO))
    axes.plot([last], [100 * mean(_means(seeds, JOINTLY))], "k*", markersize=10, label=JOINTLY)
    axes.set(xlabel="domains", ylabel="mean accuracy on the domains so far, %", xticks=range(1, last + 1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    canvas.tight_layout()
    canvas.savefig(path, metadata={"Date": None})
    pyplot.close(canvas)


def _means(seeds: Sequence[Measured], method: str) -> Iterator[float]:
    """The mean over the domains, for each seed."""
    return (mean(each.shares(method).values()) for each in seeds)


def _grown(seeds: Sequence[Measured], method: str) -> Iterator[tuple[float, ...]]:
    """After each arrival, the mean over the domains so far, for each seed."""
    return zip(*(each.means(method) for each in seeds), strict=True)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _rounded(value: Any) -> Any:
    """Numbers with four digits after the point, at any depth."""
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return round(value, 4) if isinstance(value, float) else value
