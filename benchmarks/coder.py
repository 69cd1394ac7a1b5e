"""The context coder beside lzma on the masks of a bundle: size, and decoded bits a second.

    python -m benchmarks.coder model_store/demo/1

Each mask is sent to somebody who has those before it, as ``cascade pack`` does. lzma gets the bits that differ from the
first mask, the dispatcher's. In each round both decode every mask.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.table import Table

from benchmarks.report import Figure, figure, report, single
from cascade.bundle import format as bundles
from cascade.bundle.archive import tail
from training.experiments.compression import beside_lzma


def measured(path: Path, rounds: int) -> tuple[dict[str, Figure], Table]:
    """Figures over all masks of the bundle, and a table with a line for each."""
    bundle = bundles.read(path)
    table = Table("mask", "coder, bits a weight", "lzma", "smaller by %", "coder, MB/s", "lzma", title=str(path))
    sizes, seconds = np.zeros(2), np.zeros((rounds, 2))
    for i, (mask, card) in enumerate(zip(bundle.masks, bundle.card.masks, strict=True)):
        bits = mask.bits.numpy()
        before = zip(bundle.masks[:i], bundle.card.masks[:i], strict=True)
        known = [tail(each.bits, of, card) for each, of in before]
        sent = beside_lzma(bits, known)  # compiles, too
        ours, theirs = sent["context coder"], sent["lzma"]
        took = np.array([[_timed(decode) for _, decode in (ours, theirs)] for _ in range(rounds)])
        sizes += len(ours[0]), len(theirs[0])
        seconds += took
        shares = [8 * len(data) / card.weights for data, _ in (ours, theirs)]
        speeds = len(bits) / 1e6 / np.median(took, axis=0)
        smaller = 100 * (1 - len(ours[0]) / len(theirs[0]))
        table.add_row(mask.name, *(f"{s:.3f}" for s in shares), f"{smaller:.1f}", *(f"{s:.0f}" for s in speeds))
    total = sum(mask.bits.numel() for mask in bundle.masks)
    return {
        "smaller_than_lzma": single(float(1 - sizes[0] / sizes[1]), ">= 0.1"),
        "decoded_mb_per_second": figure((total / 1e6 / seconds[:, 0]).tolist(), ">= 100"),
        "decoded_mb_per_second_lzma": figure((total / 1e6 / seconds[:, 1]).tolist()),
        "bytes": single(float(sizes[0])),
        "bytes_lzma": single(float(sizes[1])),
    }, table


def _timed(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("bundle", type=Path)
    options.add_argument("--rounds", type=int, default=9)
    chosen = options.parse_args()
    figures, table = measured(chosen.bundle, chosen.rounds)
    report(f"coder-{chosen.bundle.parent.name}", figures, table, executor=None)


if __name__ == "__main__":
    main()
