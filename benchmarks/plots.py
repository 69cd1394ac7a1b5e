"""Draw ``docs/throughput.svg`` from the committed results: ``python -m benchmarks.plots``."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

RESULTS = Path(__file__).parent / "results" / "serving-resnet50.json"
OUT = Path(__file__).parents[1] / "docs" / "throughput.svg"
AGAINST_COPIES = {20: "mixed_uniform", 32: "mixed_distinct", 100: "mixed_zipf"}  # models: name of the figure
COPY_GB = 0.094  # a ResNet-50 in float32


def main() -> None:
    """Throughput and memory of mixed traffic, by the number of models."""
    matplotlib.rcParams["svg.hashsalt"] = "throughput"
    figures = json.loads(RESULTS.read_text())["figures"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4))
    models = list(AGAINST_COPIES)
    values = [figures[name]["value"] for name in AGAINST_COPIES.values()]
    spreads = [figures[name]["spread"] for name in AGAINST_COPIES.values()]
    errors = [[v - low for v, (low, _) in zip(values, spreads, strict=True)]]
    errors.append([high - v for v, (_, high) in zip(values, spreads, strict=True)])
    labels = [f"{n} models" for n in models] + ["2,000"]
    most = figures["scale_5_to_2000"]
    left.bar(labels[:-1], values, yerr=errors, capsize=4, color="#2a7ab9")
    error = [[most["value"] - most["spread"][0]], [most["spread"][1] - most["value"]]]
    left.bar(labels[-1:], [most["value"]], yerr=error, capsize=4, color="#8cb8d8")
    left.axhline(1, color="black", linewidth=0.8)
    left.set(ylim=(0, 1.25), title="throughput over resident copies\n(2,000: over five models)")
    counts = [20, 100, 1000]
    resident = figures["resident_gb_1000"]["value"]
    left_edges = range(len(counts))
    right.bar([x - 0.2 for x in left_edges], [COPY_GB * n for n in counts], 0.4, label="copies", color="#c46a4a")
    right.bar([x + 0.2 for x in left_edges], [resident * n / 1000 for n in counts], 0.4, label="masks", color="#2a7ab9")
    right.set(yscale="log", xticks=list(left_edges), xticklabels=[f"{n:,} models" for n in counts])
    right.set(title="weights in memory, GB\n(beside one backbone)")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(OUT, metadata={"Date": None})


if __name__ == "__main__":
    main()
