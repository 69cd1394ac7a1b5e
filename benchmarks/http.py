"""Both front ends against the bare engine in the same run: throughput, latency and CPU time.

    python -m benchmarks.http --backbone resnet50
    python -m benchmarks.http --backbone tf_efficientnet_lite0

JPEG files in, answers out; both sides decode. The bundle is one mask over the whole backbone, with seeded random
weights, because time does not depend on their values. Images have the backbone's input size. Rounds are interleaved:
in each, every method answers the same number of images at each concurrency; at concurrency 1 they take turns. The
bare engine uses the concurrency as its batch size, at most 32. Client, Java and engine share the cores, so CPU
times are shown. The first round is a warm-up, in which Java compiles.
"""

import asyncio
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import httpx
import numpy as np
import psutil
import torch
import typer
from rich.table import Table

from benchmarks.images import jpegs
from benchmarks.report import Figure, figure, report
from benchmarks.synthetic import executor_name, single
from cascade import load
from cascade.bundle.format import read, write
from cascade.model import backbone as backbones
from handlers.signals import exit_on_signals
from handlers.torchserve.entrypoint import Server


class Frontend(StrEnum):
    """A front end that is compared with the bare engine."""

    asgi = "asgi"
    torchserve = "torchserve"


CONCURRENCIES = (1, 8, 32, 128)
MAX_BATCH = 32  # images in a pass of the bare engine, and of the ASGI server by default
TURN = 8  # single images before the next method takes its turn
ENGINE, ASGI, TORCHSERVE = "bare engine", "ASGI", "TorchServe"


@dataclass
class Timing:
    """The time that one method took for some images.

    Attributes:
        wall: seconds for all of them.
        latencies: seconds of each request; for the bare engine, of its pass.
        client, server: CPU seconds.
    """

    wall: float
    latencies: list[float]
    client: float
    server: float


Method = Callable[[int, int], Timing]
"""Answers a number of images (second argument) at a concurrency (first argument)."""


@dataclass
class Totals:
    """All rounds of one method at one concurrency."""

    rates: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    medians: list[float] = field(default_factory=list)
    client: list[float] = field(default_factory=list)
    server: list[float] = field(default_factory=list)

    def add(self, turns: list[Timing]) -> None:
        """Add a round of one or more turns."""
        latencies = [seconds for turn in turns for seconds in turn.latencies]
        self.rates.append(len(latencies) / sum(turn.wall for turn in turns))
        self.latencies += latencies
        self.medians.append(float(np.median(latencies)))
        self.client.append(1000 * sum(turn.client for turn in turns) / len(latencies))
        self.server.append(1000 * sum(turn.server for turn in turns) / len(latencies))


Results = dict[tuple[str, int], Totals]


def engine_peer(bundle: Path, images: list[bytes], threads: int, pipe: Connection) -> None:
    """Body of the engine's process: answers each (concurrency, count) with its Timing."""
    torch.set_num_threads(threads)
    engine = load(bundle)
    pipe.send("ready")
    while (asked := pipe.recv()) is not None:
        concurrency, count = asked
        batch = min(concurrency, MAX_BATCH)
        latencies: list[float] = []
        begin, cpu = time.perf_counter(), time.process_time()
        for first in range(0, count, batch):
            start = time.perf_counter()
            answers = engine.predict([images[i % len(images)] for i in range(first, min(first + batch, count))])
            latencies += [time.perf_counter() - start] * len(answers)
        pipe.send(Timing(time.perf_counter() - begin, latencies, 0, time.process_time() - cpu))


async def ask(url: httpx.URL, images: list[bytes], concurrency: int, count: int) -> list[float]:
    """Latencies in seconds of ``count`` requests over ``concurrency`` connections, with little work on this side."""
    head = [f"POST {url.path} HTTP/1.1", f"Host: {url.host}", "Content-Type: image/jpeg"]
    requests = ["\r\n".join([*head, f"Content-Length: {len(image)}", "", ""]).encode() + image for image in images]
    pending = iter(range(count))
    latencies: list[float] = []

    async def connection() -> None:
        reader, writer = await asyncio.open_connection(url.host, url.port)
        for i in pending:
            start = time.perf_counter()
            writer.write(requests[i % len(requests)])
            answer = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(answer.partition(b"content-length:")[2].partition(b"\r\n")[0])
            body = await reader.readexactly(length)
            if b" 200 " not in answer.partition(b"\r\n")[0]:
                raise RuntimeError(f"{url}: {answer.decode()}{body.decode()}")
            latencies.append(time.perf_counter() - start)
        writer.close()

    await asyncio.gather(*(connection() for _ in range(min(concurrency, count))))
    return latencies


def cpu_seconds(root: int) -> float:
    """CPU seconds of a process and all its descendants so far."""
    process = psutil.Process(root)
    times = [member.cpu_times() for member in (process, *process.children(recursive=True))]
    return float(sum(t.user + t.system for t in times))


def over_http(url: str, root: int, images: list[bytes], concurrency: int, count: int) -> Timing:
    """Send ``count`` images to the server whose main process is ``root``."""
    before, cpu, begin = cpu_seconds(root), time.process_time(), time.perf_counter()
    latencies = asyncio.run(ask(httpx.URL(url), images, concurrency, count))
    wall = time.perf_counter() - begin
    return Timing(wall, latencies, time.process_time() - cpu, cpu_seconds(root) - before)


@contextmanager
def asgi(store: Path) -> Iterator[tuple[str, int]]:
    """Start the ASGI server by its command; yields the URL for requests and the pid of the supervisor."""
    command = [sys.executable, "-m", "cascade.cli.main", "serve", "--frontend", "asgi", "--port", "0"]
    options = ["--model-store", str(store), "--log-level", "warning"]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        try:
            if not line.startswith("ready"):
                raise SystemExit("the ASGI server does not start: see the error above")
            yield line.split()[-1], process.pid
        finally:
            process.terminate()


@contextmanager
def bare(bundle: Path, images: list[bytes], threads: int) -> Iterator[Method]:
    """The bare engine in a separate process."""
    spawn = multiprocessing.get_context("spawn")
    pipe, theirs = spawn.Pipe()
    process = spawn.Process(target=engine_peer, args=(bundle, images, threads, theirs), daemon=True)
    process.start()
    pipe.recv()

    def take(concurrency: int, count: int) -> Timing:
        pipe.send((concurrency, count))
        timing: Timing = pipe.recv()
        return timing

    yield take
    pipe.send(None)
    process.join()


def measured(
    methods: dict[str, Method], concurrencies: list[int], requests: int, rounds: int, seconds: float
) -> Results:
    """Run at least one round, and start none after ``seconds``."""
    totals = {(method, c): Totals() for method in methods for c in concurrencies}
    end = time.monotonic() + seconds
    for nth in range(-1, rounds):
        if nth > 0 and time.monotonic() > end:
            print(f"{nth} rounds in {seconds:g} s", file=sys.stderr)
            break
        order = [*methods][nth % len(methods) :] + [*methods][: nth % len(methods)]  # each method is first in turn
        for c in concurrencies:
            count, turns = (TURN, max(1, requests // (4 * TURN))) if c == 1 else (requests, 1)
            timings: dict[str, list[Timing]] = {method: [] for method in order}
            for _ in range(turns):
                for method in order:
                    timings[method].append(methods[method](c, count))
            for method, timings_of_method in timings.items():
                if nth >= 0:
                    totals[method, c].add(timings_of_method)
    return totals


def main(
    backbone: str = "resnet50",
    frontend: Annotated[list[Frontend] | None, typer.Option(help="Repeat it for several; both by default.")] = None,
    concurrency: Annotated[list[int] | None, typer.Option(help=f"Repeat it; {CONCURRENCIES} by default.")] = None,
    rounds: int = 5,
    seconds: Annotated[float, typer.Option(help="Start no new round after this time.")] = 400,
    requests: Annotated[int, typer.Option(help="Images per round and concurrency; a quarter of that at 1.")] = 96,
    out: Annotated[
        Path | None, typer.Option(help="JSON file to write instead of the one in benchmarks/results.")
    ] = None,
) -> None:
    """Measure both front ends against the bare engine."""
    exit_on_signals(1)  # stops the servers and removes the folder
    threads = len(os.sched_getaffinity(0))  # as many as both servers use
    with ExitStack() as stack:
        store = Path(stack.enter_context(TemporaryDirectory(prefix="cascade-http-")))
        bundle = write(single(backbones.load(backbone, "random:0"), "bench", 0), store / "bench" / "1")
        images = jpegs(read(bundle).preprocessing.size)
        methods = {ENGINE: stack.enter_context(bare(bundle, images, threads))}
        if Frontend.asgi in (frontend or Frontend):
            methods[ASGI] = partial(over_http, *stack.enter_context(asgi(store)), images)
        if Frontend.torchserve in (frontend or Frontend):
            server = stack.enter_context(Server(store, auth=False, threads=threads))
            methods[TORCHSERVE] = partial(over_http, server.url, server.java.pid, images)
        results = measured(methods, concurrency or [*CONCURRENCIES], requests, rounds, seconds)
    show(backbone, results, out)


def show(backbone: str, totals: Results, out: Path | None) -> None:
    """Report the table and the figures."""
    title = f"{backbone}, JPEG files, one mask; CPU ms per image"
    table = Table(
        "method", "concurrent", "images/s", "p50 ms", "p95", "p99", "CPU ms server", "CPU ms client", title=title
    )
    figures: dict[str, Figure] = {}
    for (method, c), total in totals.items():
        p50, p95, p99 = (1000 * float(np.percentile(total.latencies, p)) for p in (50, 95, 99))
        rate, server, client = map(figure, (total.rates, total.server, total.client))
        times = [f"{ms:.1f}" for ms in (p50, p95, p99, server.value)]
        table.add_row(method, str(c), f"{rate.value:.1f}", *times, f"{client.value:.2f}")
        slug = f"{method.replace(' ', '_').lower()}_{c}"
        figures[f"images_per_second_{slug}"] = rate
        figures[f"p50_ms_{slug}"] = figure([1000 * s for s in total.medians])
        figures[f"p95_ms_{slug}"], figures[f"p99_ms_{slug}"] = figure([p95]), figure([p99])
        figures[f"server_cpu_ms_{slug}"] = server
        if method != ENGINE:
            figures[f"client_cpu_ms_{slug}"] = client
            ratios = [a / b for a, b in zip(total.rates, totals[ENGINE, c].rates, strict=True)]
            figures[f"throughput_{slug}"] = figure(ratios, ">= 0.9" if c == 32 else None)
    for method, goal in ((ASGI, "<= 3"), (TORCHSERVE, "<= 5")):
        if (method, 1) in totals:
            pairs = zip(totals[method, 1].medians, totals[ENGINE, 1].medians, strict=True)
            figures[f"added_ms_{method.lower()}_1"] = figure([1000 * (a - b) for a, b in pairs], goal)
    report(f"http-{backbone}", figures, table, executor=executor_name(backbone), out=out)


if __name__ == "__main__":
    typer.run(main)
