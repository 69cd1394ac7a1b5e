"""Simulate thousands of tenants under Zipf traffic on 1 to 64 devices: masks against one copy per tenant.

    python -m benchmarks.simulate_fleet                            # both columns, half a minute
    python -m benchmarks.simulate_fleet --measure                  # measure the times of the first column here
    python -m benchmarks.simulate_fleet --forward-ms 1 --rate 500  # another what-if

A discrete-event simulation. An image arrives at a random moment (Poisson) from a random tenant (Zipf) and goes to the
device that would finish it first, given its queue and the cost of that tenant there. A device processes one image after
another. It keeps tenants in LRU caches: with masks, the materialized ones, and the packed ones if not all fit; with
copies, those in its memory. There are no batches: a CPU gains nothing from them (docs/performance.md), a GPU would.

The first column, "measured", has times and bytes measured on two CPU cores. The second, "what-if", is a GPU of which
**nothing was measured**: all its times are assumptions and options. Memory, rate, goal and price are assumptions in
both.
"""

import json
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import typer
from rich.table import Table

from benchmarks.report import Figure, figure, report, single

DEVICES = (1, 2, 4, 8, 16, 32, 64)
ZIPF = 1.1
HELD = 8
"""Materialized masks of a device, as in benchmarks.serving."""
FUSION = 1.05e6
"""Bytes of a tenant's fusion with 256 dimensions, the default; the 1,000 masks of benchmarks.serving have one of 1."""
WEIGHTS = 93.8e6
"""Bytes of a ResNet-50, fp32: a backbone, a materialized mask, and a copy at its smallest."""
RUNTIME = 1e9
"""Bytes of a device's memory that Python, torch and batches take: an assumption."""
WARM = 0.1
"""Share of the images, the first ones, that are not counted."""
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Case:
    """A kind of device and its traffic.

    Attributes:
        forward: seconds of a pass with one image. swap: to materialize a packed mask. cold: to read, verify and pack a
        mask that is not in memory. load: to load a copy into memory.
    mask: bytes of a tenant's packed mask and everything stored with it. memory: bytes of a device.
    rate: images per second over all tenants. goal: seconds that 99 % of them may take.
    price: of a device per hour.
    """

    name: str
    forward: float
    swap: float
    cold: float
    load: float
    mask: float
    memory: float
    rate: float
    goal: float
    price: float

    @property
    def masks(self) -> int:
        """Tenants whose packed masks fit on a device, besides the backbone and the materialized masks."""
        return max(0, int((self.memory - RUNTIME - (1 + HELD) * WEIGHTS) / self.mask))

    @property
    def copies(self) -> int:
        """Tenants whose full copies fit on a device."""
        return max(0, int((self.memory - RUNTIME) / WEIGHTS))

    def ways(self) -> dict[str, "Levels"]:
        return {
            "masks": ((HELD, self.swap), (self.masks, self.cold)),
            "copies": ((self.copies, self.load),),
        }


Levels = tuple[tuple[int, float], ...]
"""(tenants that fit, seconds where one is missing), the smallest level first; misses of several levels add up."""


@dataclass(frozen=True)
class Run:
    """Results of a simulation, without its first images.

    Attributes:
        seconds: float64 [n], from an image's arrival to its answer.
        hits: share of the images whose tenant was cached, by level.
    busy: work that arrived (passes and misses) over the capacity of the devices in that time; from 1 on the queue
        grows without limit.
    lost: share of the work due to misses.
    """

    seconds: np.ndarray
    hits: tuple[float, ...]
    busy: float
    lost: float

    @property
    def p99(self) -> float:
        return float(np.quantile(self.seconds, 0.99))


def traffic(rate: float, tenants: int, exponent: float, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Arrival times (float64 [count], seconds, ascending) and tenants (int64 [count], 0 is the most frequent)."""
    generator = np.random.default_rng(seed)
    weights = np.arange(1, tenants + 1, dtype=np.float64) ** -exponent
    who = generator.choice(tenants, count, p=weights / weights.sum())
    return generator.exponential(1 / rate, count).cumsum(), who


def simulate(arrivals: np.ndarray, who: np.ndarray, tenants: int, devices: int, forward: float, levels: Levels) -> Run:
    """Send every image to the device that finishes it first; ties go round robin, starting at the tenant's own device.

    At the start the tenants are spread over the devices in turn, the most frequent first, until the levels are full.
    """
    costs = np.zeros((tenants, devices))  # seconds beside the pass, were the tenant's next image to go there
    held: list[list[OrderedDict[int, None]]] = []
    for capacity, seconds in levels:
        costs += seconds
        held.append([])
        for device in range(devices):
            first = range(tenants) if capacity >= tenants else range(device, tenants, devices)[:capacity]
            held[-1].append(OrderedDict.fromkeys(reversed(first)))
            costs[first, device] -= seconds
    ties = [1e-9 * ((np.arange(devices) - own) % devices) for own in range(devices)]
    free = np.zeros(devices)
    taken, hits, lost = np.empty(len(who)), np.zeros((len(who), len(levels)), bool), np.zeros(len(who))
    for i, (now, tenant) in enumerate(zip(arrivals.tolist(), who.tolist(), strict=True)):
        begins = np.maximum(free, now)
        device = int(np.argmin(begins + costs[tenant] + ties[tenant % devices]))
        for level, (capacity, seconds) in enumerate(levels):
            here = held[level][device]
            if tenant in here:
                here.move_to_end(tenant)
                hits[i, level] = True
                continue
            lost[i] += seconds
            if capacity == 0:
                continue
            if len(here) == capacity:
                costs[here.popitem(last=False)[0], device] += seconds
            here[tenant] = None
            costs[tenant, device] -= seconds
        free[device] = begins[device] + forward + lost[i]
        taken[i] = free[device] - now
    counted = slice(int(WARM * len(who)), None)
    time_there_is = devices * (arrivals[-1] - arrivals[counted][0])
    work = forward * len(who[counted]) + lost[counted].sum()
    shares = tuple(hits[counted].mean(0).tolist())
    return Run(taken[counted], shares, float(work / time_there_is), float(lost[counted].sum() / work))


def needed(p99: Callable[[int], float], goal: float, most: int = DEVICES[-1]) -> float:
    """The fewest devices that meet the goal, by bisection; infinity if ``most`` are not enough."""
    if p99(most) > goal:
        return math.inf
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if p99(middle) > goal else (low, middle)
    return high


def measured() -> Case:
    """Times measured on two cores of an AMD EPYC (ResNet-50, 224 px, onnx executor).

    Milliseconds come from docs/performance.md; the bytes of a mask and the cost of a new one are in the JSON.
    """
    figures = json.loads((RESULTS / "serving-resnet50.json").read_text())["figures"]
    forward, swap = 0.0400, 0.0070
    cold = (figures["cold_over_warm_one_image"]["value"] - 1) * forward - swap
    mask = figures["resident_gb_1000"]["value"] * 1e6 + FUSION
    return Case(
        "measured", forward, swap, cold, LOAD + WEIGHTS / DISK, mask, memory=16e9, rate=200, goal=0.25, price=0.10
    )


LOAD = 0.025
"""Seconds to bring a ResNet-50 from a safetensors file in the page cache into its parameters; see --measure."""
DISK = 2e9
"""Bytes a second from where the copies lie, 938 GB of them, into the page cache: an assumption. What a new mask costs
was measured with its file outside of the page cache."""


def here(case: Case, rounds: int) -> Case:
    """The case with times measured on this machine: medians over rounds."""
    import tempfile

    import torch
    from safetensors.torch import load_file, save_file

    from benchmarks import synthetic
    from benchmarks.serving.swap import build

    torch.set_grad_enabled(False)
    backbone = synthetic.load("resnet50")
    swap = build("resnet50")
    pixels = synthetic.noise(backbone, 1)
    engine = synthetic.engine_of([synthetic.single(backbone, "m", 1)], 2 * synthetic.mask_bytes(backbone))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "copy.safetensors")
        save_file(backbone.model.state_dict(), file)

        def load() -> None:
            backbone.model.load_state_dict(load_file(file))

        def forward() -> None:
            engine.run([synthetic.item(engine, "m", pixels[0], version="1")])

        def seconds(work: Callable[[], object]) -> float:
            taken = []
            for _ in range(rounds + 1):
                begin = time.perf_counter()
                work()
                taken.append(time.perf_counter() - begin)
            return median(taken[1:])

        once = median(swap(0.075)["swap"] for _ in range(rounds + 1))
        return replace(case, forward=seconds(forward), swap=once, load=seconds(load) + WEIGHTS / DISK)


@dataclass(frozen=True)
class Workload:
    """Simulated traffic: ``requests`` images for each seed, over tenants whose popularity follows Zipf's law."""

    tenants: int
    zipf: float
    requests: int
    seeds: int


ASSUMED = "The what-if column: assumptions, nothing was measured on a GPU"


def study(case: Case, workload: Workload) -> tuple[Table, dict[str, Figure]]:
    """The table of one case, and its figures, prefixed with the case's name."""
    title = f"{case.name}: {workload.tenants} tenants, zipf {workload.zipf:g}, {case.rate:g} images/s"
    table = Table("devices", "way", "hit rate", "in memory", "busy", "lost to misses", "p99 ms", title=title)
    seeds = range(workload.seeds)
    flows = [traffic(case.rate, workload.tenants, workload.zipf, workload.requests, seed) for seed in seeds]
    seen: dict[tuple[str, int, int], Run] = {}

    def run(way: str, devices: int, seed: int) -> Run:
        key = way, devices, seed
        if key not in seen:
            seen[key] = simulate(*flows[seed], workload.tenants, devices, case.forward, case.ways()[way])
        return seen[key]

    def p99_of(way: str, seed: int, devices: int) -> float:
        return run(way, devices, seed).p99

    figures: dict[str, Figure] = {}
    for devices in DEVICES:
        for way in case.ways():
            runs = [run(way, devices, seed) for seed in seeds]
            p99 = figure([1000 * r.p99 for r in runs])
            shares = [median(column) for column in zip(*(r.hits for r in runs), strict=True)]
            busy, lost = median(r.busy for r in runs), median(r.lost for r in runs)
            cells = (f"{shares[0]:.2f}", f"{shares[-1]:.2f}", f"{busy:.2f}", f"{lost:.2f}")
            waits = f"{p99.value:.1f}" if busy < 1 else "no end"
            table.add_row(str(devices), way, *cells, waits, end_section=way == "copies")
    counts: dict[str, list[float]] = {}
    for way in case.ways():
        counts[way] = [needed(partial(p99_of, way, seed), case.goal) for seed in seeds]
        figures[f"devices_{way}"] = figure(counts[way])
        at = [int(min(n, DEVICES[-1])) for n in counts[way]]
        figures[f"hit_rate_{way}"] = figure([run(way, n, s).hits[0] for n, s in zip(at, seeds, strict=True)])
        figures[f"p99_ms_{way}"] = figure([1000 * run(way, n, s).p99 for n, s in zip(at, seeds, strict=True)])
        hours = [n / case.rate * 1e6 / 3600 for n in counts[way]]
        figures[f"cost_per_million_{way}"] = figure([case.price * h for h in hours])
    figures["devices_copies_over_masks"] = figure(
        [c / m for c, m in zip(counts["copies"], counts["masks"], strict=True)]
    )
    figures["devices_all_copies_resident"] = single(math.ceil(workload.tenants / case.copies))
    figures["masks_per_device"] = single(case.masks)
    figures["copies_per_device"] = single(case.copies)
    figures["bytes_per_tenant_mask"] = single(case.mask)
    figures["bytes_per_tenant_copy"] = single(WEIGHTS)
    return table, {f"{case.name}_{name}": each for name, each in figures.items()}


def main(
    tenants: int = 10_000,
    zipf: Annotated[float, typer.Option(help="Exponent; 0: every tenant alike.")] = ZIPF,
    requests: Annotated[int, typer.Option(help="Images of a simulation.")] = 20_000,
    seeds: int = 3,
    measure: Annotated[bool, typer.Option("--measure", help="Measure forward, swap and load here.")] = False,
    rounds: Annotated[int, typer.Option(help="Of --measure.")] = 20,
    forward_ms: Annotated[float, typer.Option(rich_help_panel=ASSUMED)] = 0.5,
    swap_ms: Annotated[float, typer.Option(help="188 MB moved at some 1.3 TB/s.", rich_help_panel=ASSUMED)] = 0.15,
    cold_ms: Annotated[float, typer.Option(help="Read, verify, pack, and to the GPU.", rich_help_panel=ASSUMED)] = 5.0,
    load_ms: Annotated[float, typer.Option(help="94 MB through PCIe from memory.", rich_help_panel=ASSUMED)] = 15.0,
    memory_gb: Annotated[float, typer.Option(rich_help_panel=ASSUMED)] = 80.0,
    rate: Annotated[float, typer.Option(help="Images a second.", rich_help_panel=ASSUMED)] = 6000.0,
    goal_ms: Annotated[float, typer.Option(help="For 99 % of the images.", rich_help_panel=ASSUMED)] = 20.0,
    price: Annotated[float, typer.Option(help="Of a device for an hour.", rich_help_panel=ASSUMED)] = 3.0,
) -> None:
    """Simulate a fleet of devices with masks, and one with copies."""
    workload = Workload(tenants, zipf, requests, seeds)
    first = measured()
    if measure:
        first = here(first, rounds)
    second = Case(
        "what-if",
        forward_ms / 1000,
        swap_ms / 1000,
        cold_ms / 1000,
        load_ms / 1000,
        first.mask,
        memory_gb * 1e9,
        rate,
        goal_ms / 1000,
        price,
    )
    tables: list[Table] = []
    figures: dict[str, Figure] = {}
    inputs = Table("input", "measured", "what-if (assumed)", title="inputs")
    for name in ("forward", "swap", "cold", "load", "goal"):
        inputs.add_row(f"{name}, ms", *(f"{1000 * getattr(c, name):.3g}" for c in (first, second)))
    for name in ("memory", "rate", "price"):
        inputs.add_row(name, *(f"{getattr(c, name):.3g}" for c in (first, second)))
    for case in (first, second):
        table, found = study(case, workload)
        tables.append(table)
        figures |= found
    report("fleet" if zipf == ZIPF else f"fleet-zipf-{zipf:g}", figures, inputs, *tables, executor=None)


if __name__ == "__main__":
    typer.run(main)
