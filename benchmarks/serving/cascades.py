"""Whole cascades of five experts, batch 8: a request over one plain pass of the backbone."""

from collections.abc import Callable

from benchmarks import synthetic
from benchmarks.report import Figure, Rows, figure
from benchmarks.subprocesses import peers, ratios, rounds
from cascade.engine.results import Prediction
from cascade.engine.weight_cache import WeightCache
from cascade.model.fusion import Mode

BATCH, EXPERTS = 8, 5
CASES: dict[str, tuple[int, Mode, str]] = {
    "conditional_passes_last_stage": (-1, "conditional", "<= 1.35"),
    "conditional_passes_all": (0, "conditional", "<= 2.2"),
    "unconditional_passes_last_stage": (-1, "unconditional", "<= 2.2"),
}


def build(name: str, expert_from: int, mode: Mode) -> Callable[[int], set[int]]:
    """Requests through the engine; returns the clusters of the answers."""
    backbone = synthetic.load(name)
    stage = backbone.stage(expert_from)
    while backbone.offset(stage) == backbone.weights.numel():  # a stage without weights is none to adapt
        stage -= 1
    engine = synthetic.engine_of([synthetic.cascade(backbone, "cascade", EXPERTS, stage)], 2**31)
    pixels = synthetic.noise(backbone, 64)

    def work(nth: int) -> set[int]:
        images = [pixels[(nth * BATCH + i) % 64] for i in range(BATCH)]
        answers = engine.run([synthetic.item(engine, "cascade", image, mode) for image in images])
        return {answer.cluster for answer in answers if isinstance(answer, Prediction)}

    return work


def plain(name: str) -> Callable[[int], object]:
    """The unmasked backbone in the engine's executor."""
    from cascade.engine.executors.selection import choose

    backbone = synthetic.load(name)
    pixels = synthetic.noise(backbone, 64)
    executor = choose(backbone, WeightCache(0))
    return lambda nth: executor.run(pixels[[(nth * BATCH + i) % 64 for i in range(BATCH)]]) is None


def measure(name: str, count: int, rows: Rows) -> dict[str, Figure]:
    out = {}
    with peers({"plain": (plain, name), **{c: (build, name, s, m) for c, (s, m, _) in CASES.items()}}) as running:
        seconds = rounds(running, range(count), warm=8)
        clusters = set().union(*(running["conditional_passes_all"].time(nth)[1] for nth in range(8)))
    rows.add("one plain pass", figure([1000 * s for s in seconds["plain"]]), f"ms for {BATCH}")
    for case, (_, _, goal) in CASES.items():
        text = case.replace("_passes", "").replace("_", " ").replace("all", "all stages")
        rows.add(f"{text}, {len(clusters)} clusters seen", figure([1000 * s for s in seconds[case]]), f"ms for {BATCH}")
        out[case] = figure(ratios(seconds[case], seconds["plain"]), goal)
    return out
