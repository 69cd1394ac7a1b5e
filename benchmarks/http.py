"""Both front ends against the bare engine in the same run: throughput, latency, and whose processor time it takes.

    python -m benchmarks.http --backbone resnet50
    python -m benchmarks.http --backbone tf_efficientnet_lite0

JPEG files in, answers out, decoding on both sides. The bundle is one mask over all of the backbone (seeded random
weights: time does not depend on their values), the images are of the backbone's own size. Rounds are interleaved: in
each, every way answers as many images at each concurrency; one at a time they take turns every few images. The bare
engine takes the concurrency as its batch, 32 at most. Client, Java and engine share the cores, so the processor time
of each stands beside the figures. The first round only warms up; it is where Java compiles.
"""

import argparse
import asyncio
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import numpy as np
import psutil
import torch
from rich.table import Table

from benchmarks.images import jpegs
from benchmarks.report import Figure, figure, report
from benchmarks.synthetic import executor_name, single
from cascade import load
from cascade.bundle.format import read, write
from cascade.model import backbone as backbones
from handlers.signals import exit_on_signals
from handlers.torchserve.entrypoint import Server

CONCURRENCIES = (1, 8, 32, 128)
MOST = 32  # images in a pass of the bare engine, and of the ASGI front end by default
TURN = 8  # images one at a time, before it is the next way's turn
ENGINE, ASGI, TORCHSERVE = "bare engine", "ASGI", "TorchServe"


@dataclass
class Taken:
    """What some images took one way.

    Attributes:
        wall: seconds for all. each: seconds of each request (of the engine: of the pass that it was in).
        client, server: processor seconds.
    """

    wall: float
    each: list[float]
    client: float
    server: float


Way = Callable[[int, int], Taken]
"""Answers so many at a time, and so many images in all."""


@dataclass
class Totals:
    """All rounds of one way at one concurrency."""

    rates: list[float] = field(default_factory=list)
    each: list[float] = field(default_factory=list)
    medians: list[float] = field(default_factory=list)
    client: list[float] = field(default_factory=list)
    server: list[float] = field(default_factory=list)

    def add(self, turns: list[Taken]) -> None:
        """A round, which may have been taken in turns."""
        each = [seconds for turn in turns for seconds in turn.each]
        self.rates.append(len(each) / sum(turn.wall for turn in turns))
        self.each += each
        self.medians.append(float(np.median(each)))
        self.client.append(1000 * sum(turn.client for turn in turns) / len(each))
        self.server.append(1000 * sum(turn.server for turn in turns) / len(each))


Found = dict[tuple[str, int], Totals]


def engine_peer(bundle: Path, images: list[bytes], threads: int, pipe: Connection) -> None:
    """A process: answers (concurrency, count) with what that took."""
    torch.set_num_threads(threads)
    engine = load(bundle)
    pipe.send("ready")
    while (asked := pipe.recv()) is not None:
        concurrency, count = asked
        batch = min(concurrency, MOST)
        each: list[float] = []
        begin, cpu = time.perf_counter(), time.process_time()
        for first in range(0, count, batch):
            start = time.perf_counter()
            answers = engine.predict([images[i % len(images)] for i in range(first, min(first + batch, count))])
            each += [time.perf_counter() - start] * len(answers)
        pipe.send(Taken(time.perf_counter() - begin, each, 0, time.process_time() - cpu))


async def ask(url: httpx.URL, images: list[bytes], concurrency: int, count: int) -> list[float]:
    """Seconds of each of ``count`` requests over ``concurrency`` connections, with next to no work on this side."""
    head = [f"POST {url.path} HTTP/1.1", f"Host: {url.host}", "Content-Type: image/jpeg"]
    requests = ["\r\n".join([*head, f"Content-Length: {len(image)}", "", ""]).encode() + image for image in images]
    left = iter(range(count))
    each: list[float] = []

    async def connection() -> None:
        reader, writer = await asyncio.open_connection(url.host, url.port)
        for i in left:
            start = time.perf_counter()
            writer.write(requests[i % len(requests)])
            answer = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(answer.partition(b"content-length:")[2].partition(b"\r\n")[0])
            body = await reader.readexactly(length)
            if b" 200 " not in answer.partition(b"\r\n")[0]:
                raise RuntimeError(f"{url}: {answer.decode()}{body.decode()}")
            each.append(time.perf_counter() - start)
        writer.close()

    await asyncio.gather(*(connection() for _ in range(min(concurrency, count))))
    return each


def processor_seconds(root: int) -> float:
    """Of a process and all its descendants, so far."""
    process = psutil.Process(root)
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return float(sum(t.user + t.system for t in times))


def over_http(url: str, root: int, images: list[bytes], concurrency: int, count: int) -> Taken:
    """``count`` images to the server whose first process is ``root``."""
    before, cpu, begin = processor_seconds(root), time.process_time(), time.perf_counter()
    each = asyncio.run(ask(httpx.URL(url), images, concurrency, count))
    wall = time.perf_counter() - begin
    return Taken(wall, each, time.process_time() - cpu, processor_seconds(root) - before)


@contextmanager
def asgi(store: Path) -> Iterator[tuple[str, int]]:
    """The ASGI front end as its command starts it: where to post, and the supervisor's pid."""
    command = [sys.executable, "-m", "cascade.cli.main", "serve", "--frontend", "asgi", "--port", "0"]
    options = ["--model-store", str(store), "--log-level", "warning"]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        try:
            if not line.startswith("ready"):
                raise SystemExit("the ASGI front end does not start: its reason stands above")
            yield line.split()[-1], process.pid
        finally:
            process.terminate()


@contextmanager
def bare(bundle: Path, images: list[bytes], threads: int) -> Iterator[Way]:
    """The engine in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    pipe, theirs = spawn.Pipe()
    process = spawn.Process(target=engine_peer, args=(bundle, images, threads, theirs), daemon=True)
    process.start()
    pipe.recv()

    def take(concurrency: int, count: int) -> Taken:
        pipe.send((concurrency, count))
        taken: Taken = pipe.recv()
        return taken

    yield take
    pipe.send(None)
    process.join()


def measured(ways: dict[str, Way], concurrencies: list[int], requests: int, rounds: int, seconds: float) -> Found:
    """At least one round, and no new one once the seconds are over."""
    totals = {(way, c): Totals() for way in ways for c in concurrencies}
    end = time.monotonic() + seconds
    for nth in range(-1, rounds):
        if nth > 0 and time.monotonic() > end:
            print(f"{nth} rounds in {seconds:g} s", file=sys.stderr)
            break
        order = [*ways][nth % len(ways) :] + [*ways][: nth % len(ways)]  # nobody is always the first
        for c in concurrencies:
            count, turns = (TURN, max(1, requests // (4 * TURN))) if c == 1 else (requests, 1)
            taken: dict[str, list[Taken]] = {way: [] for way in order}
            for _ in range(turns):
                for way in order:
                    taken[way].append(ways[way](c, count))
            for way, each in taken.items():
                if nth >= 0:
                    totals[way, c].add(each)
    return totals


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--backbone", default="resnet50")
    options.add_argument("--frontends", nargs="+", default=["asgi", "torchserve"], choices=["asgi", "torchserve"])
    options.add_argument("--concurrency", nargs="+", type=int, default=[*CONCURRENCIES])
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--seconds", type=float, default=400, help="no round begins after so many")
    options.add_argument("--requests", type=int, default=96, help="in a round, at each concurrency; a 4th at 1")
    options.add_argument("--out", type=Path, help="the JSON; else it goes to benchmarks/results")
    chosen = options.parse_args()
    exit_on_signals(1)  # in order: no server and no folder stays
    threads = len(os.sched_getaffinity(0))  # as both front ends have them
    with ExitStack() as stack:
        store = Path(stack.enter_context(TemporaryDirectory(prefix="cascade-http-")))
        bundle = write(single(backbones.load(chosen.backbone, "random:0"), "bench", 0), store / "bench" / "1")
        images = jpegs(read(bundle).preprocessing.size)
        ways = {ENGINE: stack.enter_context(bare(bundle, images, threads))}
        if "asgi" in chosen.frontends:
            ways[ASGI] = partial(over_http, *stack.enter_context(asgi(store)), images)
        if "torchserve" in chosen.frontends:
            server = stack.enter_context(Server(store, auth=False, threads=threads))
            ways[TORCHSERVE] = partial(over_http, server.url, server.java.pid, images)
        found = measured(ways, chosen.concurrency, chosen.requests, chosen.rounds, chosen.seconds)
    show(chosen.backbone, found, chosen.out)


def show(backbone: str, totals: Found, out: Path | None) -> None:
    """The table and the figures."""
    title = f"{backbone}, JPEG files, one mask; CPU ms are processor time for an image"
    table = Table("way", "at a time", "images/s", "p50 ms", "p95", "p99", "CPU ms server", "CPU ms client", title=title)
    figures: dict[str, Figure] = {}
    for (way, c), total in totals.items():
        p50, p95, p99 = (1000 * float(np.percentile(total.each, p)) for p in (50, 95, 99))
        rate, server, client = map(figure, (total.rates, total.server, total.client))
        times = [f"{ms:.1f}" for ms in (p50, p95, p99, server.value)]
        table.add_row(way, str(c), f"{rate.value:.1f}", *times, f"{client.value:.2f}")
        slug = f"{way.replace(' ', '_').lower()}_{c}"
        figures[f"images_per_second_{slug}"] = rate
        figures[f"p50_ms_{slug}"] = figure([1000 * s for s in total.medians])
        figures[f"p95_ms_{slug}"], figures[f"p99_ms_{slug}"] = figure([p95]), figure([p99])
        figures[f"server_cpu_ms_{slug}"] = server
        if way != ENGINE:
            figures[f"client_cpu_ms_{slug}"] = client
            ratios = [a / b for a, b in zip(total.rates, totals[ENGINE, c].rates, strict=True)]
            figures[f"throughput_{slug}"] = figure(ratios, ">= 0.9" if c == 32 else None)
    for way, goal in ((ASGI, "<= 3"), (TORCHSERVE, "<= 5")):
        if (way, 1) in totals:
            pairs = zip(totals[way, 1].medians, totals[ENGINE, 1].medians, strict=True)
            figures[f"added_ms_{way.lower()}_1"] = figure([1000 * (a - b) for a, b in pairs], goal)
    report(f"http-{backbone}", figures, table, executor=executor_name(backbone), out=out)


if __name__ == "__main__":
    main()
