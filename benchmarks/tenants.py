"""Customers that share a server: how a flood affects a quiet one, what fairness costs, and how even the shares are.

    python -m benchmarks.tenants                                        # ResNet-50, about ten minutes
    python -m benchmarks.tenants --backbone test_resnet --seconds 5     # a quick look

Two ASGI servers on one store, with a bundle, a key and a name per tenant. The ``fair`` one has its defaults. The
``arrival`` one is our batcher without tenants: all clients send the same key, ``--patience 0`` takes groups in
order of arrival, and no time slice ends a pass. Only one is busy at a time; rounds are interleaved. JPEG files in,
answers out; clients share the cores with the servers.

victim_p99       p99 of a tenant that sends one image after the other, with pauses, while another sends ten times the
                 server's capacity; over its p99 alone
fair_throughput  images per second of all tenants, each with several requests in progress all the time: fair over
                 arrival
jain             Jain's index of these tenants' throughput, although some have three times as many requests in progress
"""

import asyncio
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import httpx
import numpy as np
import typer
from rich.table import Table

from benchmarks.images import jpegs
from benchmarks.report import Figure, figure, report
from benchmarks.subprocesses import serving
from benchmarks.synthetic import executor_name, single
from cascade.bundle.format import read, write
from cascade.model import backbone as backbones
from handlers.signals import exit_on_signals

OVERLOAD = 10  # times what the server can carry
CONNECTIONS = 256  # of the tenant that floods: more than it may have in the queue
REQUESTS = (2, 4, 6)  # in progress, of one saturating tenant after the other
PAUSE = 0.2  # mean seconds between two images of the quiet tenant
LIMIT = 60.0  # seconds for an answer


@dataclass
class Seen:
    """The answers to one tenant in some time: seconds of each with status 200, and the number of each status."""

    seconds: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)

    @property
    def p99(self) -> float:
        return float(np.percentile(self.seconds, 99))

    @property
    def refused(self) -> int:
        return self.statuses.total() - self.statuses[200]


class Sender:
    """One connection of one tenant. It does little work, because it shares the cores with the server."""

    def __init__(self, url: httpx.URL, key: str, bundle: str, images: list[bytes]) -> None:
        head = [f"POST {url.path} HTTP/1.1", f"Host: {url.host}", f"Authorization: Bearer {key}"]
        head += [f"X-Cascade-Bundle: {bundle}", "X-Cascade-Fields: labels", "Content-Type: image/jpeg"]
        self.url = url
        self.requests = ["\r\n".join([*head, f"Content-Length: {len(i)}", "", ""]).encode() + i for i in images]
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def send(self, number: int, seen: Seen) -> None:
        """Send an image and note its answer."""
        begin = time.perf_counter()
        if self.streams is None:
            self.streams = await asyncio.open_connection(self.url.host, self.url.port)
        reader, writer = self.streams
        writer.write(self.requests[number % len(self.requests)])
        async with asyncio.timeout(LIMIT):
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            await reader.readexactly(int(head.partition(b"content-length:")[2].partition(b"\r\n")[0]))
        status = int(head[9:12])
        seen.statuses[status] += 1
        if status == 200:
            seen.seconds.append(time.perf_counter() - begin)

    def close(self) -> None:
        if self.streams is not None:
            self.streams[1].close()


@dataclass(frozen=True)
class Server:
    """A running server; ``shared``: all clients send the key for all bundles."""

    url: httpx.URL
    images: list[bytes]
    shared: bool = False

    def sender(self, tenant: int) -> Sender:
        return Sender(self.url, "shared" if self.shared else f"key-{tenant}", f"tenant-{tenant}", self.images)


async def saturate(server: Server, tenants: int, seconds: float) -> list[Seen]:
    """All tenants send whenever they have fewer than their REQUESTS in progress."""
    seen = [Seen() for _ in range(tenants)]
    end = time.monotonic() + seconds

    async def client(tenant: int, number: int) -> None:
        sender = server.sender(tenant)
        while time.monotonic() < end:
            await sender.send(number, seen[tenant])
            number += 1
        sender.close()

    senders = [(tenant, n) for tenant in range(tenants) for n in range(REQUESTS[tenant % len(REQUESTS)])]
    await asyncio.gather(*(client(*sender) for sender in senders))
    return seen


async def quiet(server: Server, seconds: float, seed: int) -> Seen:
    """Tenant 0 sends an image now and then."""
    seen, sender, draw = Seen(), server.sender(0), random.Random(seed)
    end, number = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        await sender.send(number, seen)
        number += 1
        await asyncio.sleep(draw.uniform(0, 2 * PAUSE))
    sender.close()
    return seen


async def flood(server: Server, rate: float, seen: Seen) -> None:
    """Tenant 1 sends ``rate`` images a second, whether answers come or not, until it is cancelled."""
    idle = [server.sender(1) for _ in range(CONNECTIONS)]
    senders, tasks = [*idle], set[asyncio.Task[None]]()
    begin, number = time.monotonic(), 0

    async def one(sender: Sender, number: int) -> None:
        await sender.send(number, seen)
        idle.append(sender)

    try:
        while True:
            due = int((time.monotonic() - begin) * rate)
            for number in range(number, due):  # noqa: B020
                if idle:
                    task = asyncio.create_task(one(idle.pop(), number))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
            number = max(number, due)
            await asyncio.sleep(0.005)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for sender in senders:
            sender.close()


async def beside(server: Server, rate: float, seconds: float, seed: int) -> tuple[Seen, Seen]:
    """The quiet tenant beside the flood, once that has filled its share of the queue; and the flood."""
    flooded = Seen()
    task = asyncio.create_task(flood(server, rate, flooded))
    await asyncio.sleep(3)
    seen = await quiet(server, seconds, seed)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return seen, flooded


def jain(values: list[int]) -> float:
    """Jain's index: 1 if all are equal, 1/n if one has everything."""
    return float(sum(values) ** 2 / (len(values) * sum(v * v for v in values)))


@contextmanager
def servers(backbone: str, tenants: int) -> Iterator[tuple[Server, Server]]:
    """The fair server, and the one in order of arrival."""
    with TemporaryDirectory(prefix="cascade-tenants-") as folder, ExitStack() as stack:
        store, keys = Path(folder, "store"), Path(folder, "keys")
        network = backbones.load(backbone, "random:0")
        bundle = write(single(network, "tenant-0", 0), store / "tenant-0" / "1")
        for i in range(1, tenants):  # a mask apart is a mask apart, however equal its bits
            shutil.copytree(bundle, store / f"tenant-{i}" / "1")
        images = jpegs(read(bundle).preprocessing.size)
        lines = [f"tenant-{i} {digest(f'key-{i}')} name=tenant-{i}" for i in range(tenants)]
        keys.write_text("\n".join([*lines, f"* {digest('shared')} name=shared"]))
        common = ("--api-keys", str(keys), "--log-level", "error")
        fair = stack.enter_context(serving(store, *common))
        in_order = ("--patience", "0", "--time-slice", "60", "--queue", "512")
        arrival = stack.enter_context(serving(store, *common, *in_order))
        yield Server(fair, images), Server(arrival, images, shared=True)


def digest(key: str) -> str:
    return sha256(key.encode()).hexdigest()


@dataclass(frozen=True)
class Plan:
    """Plan of the measurement: tenants, rounds, and the seconds of each measurement."""

    backbone: str
    tenants: int
    rounds: int
    seconds: float


def main(
    backbone: str = "resnet50",
    tenants: int = 20,
    rounds: int = 3,
    seconds: Annotated[float, typer.Option(help="Of each measurement.")] = 40,
    out: Annotated[
        Path | None, typer.Option(help="JSON file to write instead of the one in benchmarks/results.")
    ] = None,
) -> None:
    """Measure a quiet tenant during a flood, the cost of fairness, and how even the shares are."""
    exit_on_signals(1)  # stops the servers and removes the folder
    plan = Plan(backbone, tenants, rounds, seconds)
    shares: dict[str, list[list[Seen]]] = {"fair": [], "arrival": []}
    alone: list[Seen] = []
    flooded: list[tuple[Seen, Seen]] = []
    with servers(plan.backbone, plan.tenants) as (fair, arrival):
        for server in (fair, arrival):
            asyncio.run(saturate(server, plan.tenants, plan.seconds / 8))  # warm
        for nth in range(plan.rounds):
            for name, server in (("fair", fair), ("arrival", arrival)):
                shares[name].append(asyncio.run(saturate(server, plan.tenants, plan.seconds)))
            carried = sum(len(seen.seconds) for seen in shares["fair"][-1]) / plan.seconds
            alone.append(asyncio.run(quiet(fair, plan.seconds, nth)))
            flooded.append(asyncio.run(beside(fair, OVERLOAD * carried, plan.seconds, nth)))
    show(plan, shares, alone, flooded, out)


def show(
    plan: Plan,
    shares: dict[str, list[list[Seen]]],
    alone: list[Seen],
    flooded: list[tuple[Seen, Seen]],
    out: Path | None,
) -> None:
    """Report the tables and the figures."""
    images = {n: [[len(seen.seconds) for seen in run] for run in runs] for n, runs in shares.items()}
    rates = {name: [sum(run) / plan.seconds for run in runs] for name, runs in images.items()}
    table = Table("server", "images/s", "least of a tenant", "most", "Jain", "refused", title=f"{plan.tenants} tenants")
    for name, runs in images.items():
        refused = sum(seen.refused for run in shares[name] for seen in run)
        least, most = (f"{extreme(map(extreme, runs)) / plan.seconds:.2f}" for extreme in (min, max))
        table.add_row(
            name,
            f"{figure(rates[name]).value:.1f}",
            least,
            most,
            f"{figure([*map(jain, runs)]).value:.3f}",
            f"{refused}",
        )
    second = Table("quiet tenant", "images", "p50 ms", "p99 ms", "refused", title="beside a flood")
    for name, runs_of_one in (
        ("alone", alone),
        ("beside it", [seen for seen, _ in flooded]),
        ("the flood", [f for _, f in flooded]),
    ):
        seconds = [s for seen in runs_of_one for s in seen.seconds]
        cells = (f"{1000 * float(np.percentile(seconds, p)):.1f}" for p in (50, 99))
        second.add_row(name, str(len(seconds)), *cells, str(sum(seen.refused for seen in runs_of_one)))
    figures: dict[str, Figure] = {
        "victim_p99": figure([seen.p99 / lone.p99 for (seen, _), lone in zip(flooded, alone, strict=True)], "<= 2.5"),
        "victim_refused": figure([float(seen.refused) for seen, _ in flooded], "<= 0"),
        "victim_p99_ms": figure([1000 * seen.p99 for seen, _ in flooded]),
        "victim_p99_ms_alone": figure([1000 * seen.p99 for seen in alone]),
        "fair_throughput": figure([a / b for a, b in zip(rates["fair"], rates["arrival"], strict=True)], ">= 0.95"),
        "jain": figure([*map(jain, images["fair"])], ">= 0.98"),
        "jain_arrival": figure([*map(jain, images["arrival"])]),
        "images_per_second": figure(rates["fair"]),
    }
    name = "tenants" if plan.backbone == "resnet50" else f"tenants-{plan.backbone}"
    report(name, figures, table, second, executor=executor_name(plan.backbone), out=out)


if __name__ == "__main__":
    typer.run(main)
