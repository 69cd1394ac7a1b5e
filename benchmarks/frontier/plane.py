"""From the stored results of all studies to the plane: tables, and the figures of the benchmark."""

from collections.abc import Iterable
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.table import Table

from benchmarks.frontier.methods import FAIR_TAIL, METHODS, MORE, PLAIN, ROUTED_TAIL, Method
from benchmarks.frontier.sets import MASK_FROM, SETS, SIDE
from benchmarks.report import Figure, Rows, report, single
from cascade.errors import CascadeError
from training.run import read_json

RESULTS, COSTS = "results.json", "cost.json"
MOST = 2.2  # passes
TAILS = {"one mask": 1, "two masks": 2, "dispatcher and routed expert": 2, "dispatcher and five experts": 6}
TAILS |= {PLAIN: 1, "dispatcher and two experts": 3}
Results = dict[tuple[str, str, int], dict[str, Any]]
"""What was stored, by backbone, data set and seed."""


def costs(found: dict[int, dict[str, Figure]], share: float) -> dict[str, Any]:
    """What is kept of measured costs: passes by time, by side in px, and the masked stages' share of operations."""
    by_side = {str(side): {way: [f.value, *f.spread] for way, f in ways.items()} for side, ways in found.items()}
    return {"share": share, "time": by_side}


def mean_costs(of: list[dict[str, Any]]) -> dict[str, Any]:
    """Of several backbones, by the sides that were measured with all of them."""
    sides = set.intersection(*(set(c["time"]) for c in of))
    time = {s: {w: [mean(c["time"][s][w][0] for c in of)] for w in of[0]["time"][s]} for s in sorted(sides)}
    return {"share": mean(c["share"] for c in of), "time": time}


def collect(folder: Path, backbones: Iterable[str], sets: Iterable[str], seeds: Iterable[int]) -> Results:
    """The studies among these that have measured all ``METHODS``."""
    out: Results = {}
    for key in product(backbones, sets, seeds):
        path = folder.joinpath(*map(str, key)) / RESULTS
        if path.exists() and set(METHODS) <= set(found := read_json(path)):
            out[key] = found
    return out


def operations(method: Method, cost: dict[str, Any]) -> float:
    """Passes by multiplications."""
    return float(1 + (TAILS[method.served] - 1) * cost["share"])


def passes(method: Method, cost: dict[str, Any], side: int = SIDE) -> float | None:
    """Passes by measured time; None where the engine has no such way."""
    if method.served == PLAIN:
        return 1.0
    measured = cost["time"].get(str(side), {}).get(method.served)
    return float(measured[0]) if measured else None


def scores(results: Results, method: str, split: str, metric: str) -> list[float]:
    """One value a seed: the mean over the backbones and data sets that all seeds have."""
    seeds = sorted({seed for _, _, seed in results})
    return [mean(results[b, s, seed][method][split][metric] for b, s in places(results)) for seed in seeds]


def best(results: Results, names: Iterable[str]) -> str:
    """The method with the highest probe accuracy on the validation images."""
    return max(names, key=lambda n: mean(scores(results, n, "validation", "probe")))


def places(results: Results) -> list[tuple[str, str]]:
    """The backbones and data sets that all seeds have: what means are over."""
    seeds = {seed for _, _, seed in results}
    return sorted({(b, s) for b, s, _ in results if all((b, s, seed) in results for seed in seeds)})


def figures(results: Results, cost: dict[str, Any]) -> tuple[dict[str, Figure], str, str, str]:
    """The benchmark's figures; and the best method within ``MOST`` passes, the best routed one, and its control."""
    steps = {n: results[next(iter(results))][n]["steps"] for n in METHODS}
    work = {n: operations(m, cost) for n, m in METHODS.items()}
    at = {n: passes(m, cost) or work[n] for n, m in METHODS.items()}
    cheap = best(results, [n for n, m in METHODS.items() if m.kind != "chosen" and at[n] <= MOST])
    routed = best(results, [n for n, m in METHODS.items() if m.kind == "routed"])
    fair = [n for n, m in METHODS.items() if m.kind in ("single", "unrouted") and steps[n] <= steps[routed]]
    control = best(results, [n for n in fair if work[n] <= work[routed]])  # two masks are the routed one's operations
    out = {
        "gap_to_six_passes": _difference(results, "unconditional", cheap, "probe", "<= 0"),
        "routed_minus_control": _difference(results, routed, control, "probe", "> 0"),
        "routed_minus_control_knn": _difference(results, routed, control, "knn"),
    }
    paired = _paired(results, routed, control, "probe")
    if len(paired) > 1:
        in_sd = mean(paired) / max(stdev(paired), 1e-9)
        out["routed_minus_control_sd"] = single(in_sd, ">= 2")
    by_set = {of: {k: v for k, v in results.items() if k[1] == of} for of in sorted({of for _, of, _ in results})}
    for of, own in by_set.items():
        out[f"routed_minus_control_{of}"] = _difference(own, routed, control, "probe")
    out["routed_tail_minus_control"] = _difference(results, ROUTED_TAIL, FAIR_TAIL, "probe")
    for of, own in by_set.items():
        out[f"routed_tail_minus_control_{of}"] = _difference(own, ROUTED_TAIL, FAIR_TAIL, "probe")
    out["six_passes_minus_frozen"] = _difference(results, "unconditional", "frozen backbone", "probe")
    for n in ("dispatcher", "two masks, no routing", routed, "unconditional"):
        if (time := passes(METHODS[n], cost)) is not None:
            out[f"passes: {METHODS[n].served}"] = single(time)
    return out, cheap, routed, control


def report_all(folder: Path, results: Results, rows: Rows, mask_from: str) -> None:
    """Tables of every backbone, and the figures over all of them, under a name of their own for an earlier stage."""
    if not results:
        raise CascadeError(f"nothing in {folder} has been measured to its end yet: leave --report out")
    backbones, tables = list(dict.fromkeys(b for b, _, _ in results)), [rows.table] if rows.table.row_count else []
    cost = {b: _costs(folder / b / COSTS) for b in backbones}
    for b in backbones:
        own = {k: v for k, v in results.items() if k[0] == b}
        tables += [_table(b, own, cost[b], METHODS, "test"), *_explored(b, folder, cost[b])]
    found, cheap, routed, control = figures(results, mean_costs(list(cost.values())))
    print("figures are means over", ", ".join(f"{of} with {b}" for b, of in places(results)))
    print(f"chosen by validation: within {MOST} passes: {cheap}; routed: {routed}; its control: {control}")
    report("frontier" if mask_from == MASK_FROM else f"frontier-{mask_from}", found, *tables)


def _costs(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = read_json(path)
    except FileNotFoundError:
        raise CascadeError(f"no costs in {path} yet: leave --rounds 0 out to measure them") from None
    return found


def _difference(results: Results, a: str, b: str, metric: str, goal: str | None = None) -> Figure:
    values = _paired(results, a, b, metric)
    return Figure(mean(values), (min(values), max(values)), goal)


def _paired(results: Results, a: str, b: str, metric: str) -> list[float]:
    """Points between two methods on the test images, one value a seed."""
    both = (scores(results, n, "test", metric) for n in (a, b))
    return [x - y for x, y in zip(*both, strict=True)]


def _explored(backbone: str, folder: Path, cost: dict[str, Any]) -> list[Table]:
    """What only the first seed was measured by, on the validation images of the data sets that were explored."""
    found: Results = {}
    for of in SETS:
        path = folder / backbone / of / "0" / RESULTS
        if path.exists() and set(MORE) & set(read := read_json(path)):
            found[backbone, of, 0] = read
    common = {n: m for n, m in (METHODS | MORE).items() if all(n in read for read in found.values())}
    return [_table(backbone, found, cost, common, "validation")] if found else []


def _table(backbone: str, results: Results, cost: dict[str, Any], methods: dict[str, Method], split: str) -> Table:
    """k-NN / probe of each data set, mean ± standard deviation over the seeds."""
    sets = [of for of in SETS if any(k[1] == of for k in results)]
    seeds = len({seed for _, _, seed in results})
    title = f"{backbone}, {split} images, {seeds} seed{'s' if seeds > 1 else ''}: k-NN, probe; passes"
    table = Table("method", f"{SIDE} px", "224 px", "operations", "steps", *sets, title=title)
    for name, method in methods.items():
        time, large = passes(method, cost), passes(method, cost, 224)
        cells = []
        for of in sets:
            own = {k: v for k, v in results.items() if k[1] == of}
            cells.append("  ".join(_cell(scores(own, name, split, metric)) for metric in ("knn", "probe")))
        steps = str(next(iter(results.values()))[name]["steps"])
        table.add_row(name, *(_passes(p) for p in (time, large, operations(method, cost))), steps, *cells)
    return table


def _passes(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _cell(values: list[float]) -> str:
    return f"{mean(values):.1f}" + (f"±{stdev(values):.1f}" if len(values) > 1 else "")
