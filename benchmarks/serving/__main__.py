"""Traffic that mixes many masks, against copies of the weights and against common alternatives.

    python -m benchmarks.serving                                    # ResNet-50, 224 px: half an hour on two cores
    python -m benchmarks.serving --backbone vit_base_patch32_224    # or tf_efficientnet_lite0
    python -m benchmarks.serving --only swap,mixed_uniform          # some of the measurements

Weights are random with a seed: neither time nor bytes depend on their values. Images are already decoded. Each item has
one mask, except for the cascades. Peers are separate processes, interleaved by rounds.
"""

import os
import sys
import time
from collections.abc import Callable
from typing import Annotated

import typer

from benchmarks import synthetic
from benchmarks.report import Figure, Rows, report, single
from benchmarks.serving import cascades, cold, executors, mixed, scale, swap, torchserve
from cascade.errors import CascadeError

WHOLE = ("resnet50",)
"""The backbones for which everything is measured; for others what depends on the backbone."""


def main(
    name: Annotated[str, typer.Option("--backbone")] = "resnet50",
    count: Annotated[int, typer.Option("--rounds")] = 9,
    only: Annotated[str, typer.Option(help="Names of measurements, separated by commas.")] = "",
    masks: Annotated[int, typer.Option(help="Of scale_5_to_2000.")] = 2000,
) -> None:
    """Measure throughput, memory and swaps under mixed traffic."""
    tables = {key: Rows(f"{title}: {name}") for key, title in TITLES.items()}
    measurements: dict[str, Callable[[], dict[str, Figure]]] = {
        "executors": lambda: executors.measure(name, count, tables["executors"]),
        "swap": lambda: swap.measure(name, 5 * count, tables["swap"]),
        "mixed_uniform": lambda: mixed.against_copies(
            name, "mixed_uniform", 20, mixed.uniform(20, count), ">= 0.9", True, tables["mixed"]
        ),
        "mixed_zipf": lambda: mixed.against_copies(
            name, "mixed_zipf", 100, mixed.zipf(100, count), ">= 0.95", False, tables["mixed"]
        ),
        "mixed_distinct": lambda: mixed.against_copies(
            name, "mixed_distinct", 32, [list(range(32))] * count, ">= 0.75", True, tables["mixed"]
        ),
        "identical": lambda: mixed.identical(name, count, tables["mixed"]),
        "today": lambda: mixed.against_today(name, mixed.uniform(20, count), 20, tables["mixed"]),
        "cascades": lambda: cascades.measure(name, 2 * count, tables["cascades"]),
        "cold": lambda: cold.measure(name, count, tables["cold"]),
        "scale": lambda: scale.measure(name, masks, 384, max(3, count // 3), tables["scale"]),
        "torchserve": lambda: torchserve.measure(name, 6, count, tables["torchserve"]),
    }
    wanted = only.split(",") if only else list(measurements)
    if unknown := set(wanted) - set(measurements):
        raise typer.BadParameter(f"no measurement {' '.join(unknown)}; there are: {' '.join(measurements)}")
    if not only and name not in WHOLE:
        wanted = ["executors", "mixed_uniform", "mixed_distinct", "identical", "cascades"]
    figures: dict[str, Figure] = {"load_average_before": single(os.getloadavg()[0])}
    failed = []
    for key in wanted:
        print(f"{time.strftime('%H:%M:%S')} measuring {key} ...", flush=True)
        try:
            figures |= measurements[key]()
        except (RuntimeError, CascadeError) as error:  # what was measured before is not lost
            print(f"{key} failed: {error}", file=sys.stderr)
            failed.append(key)
    report(
        f"serving-{name}" + (f"-{'-'.join(wanted)}" if only else ""),
        figures,
        *(rows.table for rows in tables.values() if rows.table.row_count),
        executor=synthetic.executor_name(name),
    )
    sys.exit(f"failed: {' '.join(failed)}" if failed else 0)


TITLES = {
    "executors": "the unmasked backbone",
    "swap": "a swap of all weights",
    "mixed": "batches of 32 images",
    "cascades": "cascades",
    "cold": "a new mask",
    "scale": "many masks",
    "torchserve": "TorchServe",
}

if __name__ == "__main__":
    typer.run(main)
