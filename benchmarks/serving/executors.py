"""Every executor of the unmasked backbone at batch 8, over eager timm."""

from benchmarks.report import Figure, Rows, figure
from benchmarks.serving import baselines
from benchmarks.subprocesses import peers, ratios, rounds

BATCH = 8


def measure(name: str, count: int, rows: Rows) -> dict[str, Figure]:
    builds = {
        "eager": (baselines.eager, name, "contiguous"),
        "eager, channels last": (baselines.eager, name, "channels_last"),
        "static ONNX Runtime (cannot swap)": (baselines.static_copies, name, 1),
        "folded": (baselines.unmasked, name, "folded"),
        "onnx": (baselines.unmasked, name, "onnx"),
        "bf16": (baselines.unmasked, name, "bf16"),
    }
    with peers(builds) as running:
        seconds = rounds(running, [[0] * BATCH] * count)
        single = rounds(running, [[0]] * count)
    for way in builds:
        rows.add(f"{way}, batch {BATCH}", figure([1000 * s / BATCH for s in seconds[way]]), "ms an image")
        rows.add(f"{way}, batch 1", figure([1000 * s for s in single[way]]), "ms an image")
    best = min(("folded", "onnx"), key=lambda way: sorted(seconds[way])[count // 2])
    return {
        "swappable_over_eager_cpu": figure(ratios(seconds["eager"], seconds[best]), ">= 1.6"),
        "swappable_over_channels_last_cpu": figure(ratios(seconds["eager, channels last"], seconds[best]), ">= 1"),
        "swappable_over_static": figure(ratios(seconds["static ONNX Runtime (cannot swap)"], seconds[best])),
        "swappable_over_eager_cpu_batch_1": figure(ratios(single["eager"], single[best])),
        "bf16_over_swappable": figure(ratios(seconds[best], seconds["bf16"])),
    }
