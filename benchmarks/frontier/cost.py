"""What each way to serve costs in time, over one plain pass: through the engine, batch 8, masks on the last stages."""

from collections.abc import Callable

import torch
from torch import nn

from benchmarks import synthetic
from benchmarks.report import Figure, Rows, figure
from benchmarks.subprocesses import peers, ratios, rounds
from cascade.engine.weight_cache import Residency
from cascade.model.backbone import Backbone
from cascade.model.fusion import Mode

BATCH = 8
WAYS: dict[str, tuple[int, Mode]] = {
    "one mask": (0, "dispatcher"),
    "two masks": (1, "unconditional"),
    "dispatcher and routed expert": (5, "conditional"),
    "dispatcher and five experts": (5, "unconditional"),
}
"""Number of experts and mode. A second mask without routing is a bundle of one expert, served unconditionally."""


def build(name: str, side: int, mask_from: str, experts: int, mode: Mode) -> Callable[[int], object]:
    """Requests through the engine: router, expert passes, fusion."""
    backbone = _load(name, side)
    stage = backbone.stage(mask_from)
    bundle = (
        synthetic.cascade(backbone, "cascade", experts, stage, stage)
        if experts
        else synthetic.single(backbone, "cascade", 0, mask_from=stage)
    )
    engine = synthetic.engine_of([bundle], 2**31)
    pixels = synthetic.noise(backbone, 64)

    def work(nth: int) -> int:
        images = [pixels[(nth * BATCH + i) % 64] for i in range(BATCH)]
        return len(
            {p.cluster for p in engine.run([synthetic.item(engine, "cascade", image, mode) for image in images])}
        )

    return work


def plain(name: str, side: int) -> Callable[[int], object]:
    """The unmasked backbone in the executor that the engine takes."""
    from cascade.engine.executors.selection import choose

    backbone = _load(name, side)
    pixels = synthetic.noise(backbone, 64)
    executor = choose(backbone, Residency(0))
    return lambda nth: executor.run(pixels[[(nth * BATCH + i) % 64 for i in range(BATCH)]]) is None


def measure(name: str, mask_from: str, side: int, count: int, rows: Rows) -> dict[str, Figure]:
    """Each way's time over that of a plain pass."""
    ways = {way: (build, name, side, mask_from, *parts) for way, parts in WAYS.items()}
    with peers({"plain": (plain, name, side), **ways}) as running:
        seconds = rounds(running, range(count), warm=8)
    rows.add(f"{name}, {side} px, one plain pass", figure([1000 * s for s in seconds["plain"]]), f"ms for {BATCH}")
    found = {way: figure(ratios(seconds[way], seconds["plain"])) for way in WAYS}
    for way, cost in found.items():
        rows.add(f"{name}, {side} px, {way}", cost, "passes")
    return found


def operations(backbone: Backbone, mask_from: str, side: int) -> float:
    """The masked stages' share of a pass, in multiplications of convolutions and linear layers."""
    counts: list[tuple[bool, int]] = []
    prefixes = [p for stage in backbone.row[backbone.stage(mask_from) :] for p in stage.prefixes]
    last = {id(m) for p in prefixes for m in backbone.model.get_submodule(p).modules()}

    def count(module: nn.Module, x: object, y: torch.Tensor) -> None:
        weight: torch.Tensor = module.weight  # type: ignore[assignment]
        counts.append((id(module) in last, weight[0].numel() * y.numel()))

    layers = [m for m in backbone.model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    hooks = [m.register_forward_hook(count) for m in layers]
    backbone.run(torch.zeros(1, 3, side, side))
    for hook in hooks:
        hook.remove()
    return sum(n for masked, n in counts if masked) / sum(n for _, n in counts)


def _load(name: str, side: int) -> Backbone:
    backbone = synthetic.load(name)
    backbone.config["input_size"] = (3, side, side)
    return backbone
