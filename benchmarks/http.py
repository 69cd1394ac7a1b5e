"""Both front ends against the bare engine in the same run: throughput, latency, and whose processor time it takes.

    python -m benchmarks.http --backbone resnet50
    python -m benchmarks.http --backbone tf_efficientnet_lite0

JPEG files in, answers out, decoding on both sides. The bundle is one mask over all of the backbone (seeded random
weights: time does not depend on their values), the images are of the backbone's own size. Rounds are interleaved: in
each, every way answers as many images at each concurrency. The bare engine takes the concurrency as its batch, 32 at
most. Client, Java and engine share the cores, so the processor time of each stands beside the figures.
"""

import argparse
import asyncio
import io
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import numpy as np
import psutil
import torch
from PIL import Image
from rich.table import Table

from benchmarks.made import single
from benchmarks.report import Figure, figure, report
from cascade import backbone as backbones
from cascade import load
from cascade.bundle import write
from handlers.torchserve.entrypoint import Server

CONCURRENCIES = (1, 8, 32, 128)
MOST = 32  # images in a pass
PHOTOS = Path(__file__).parents[1] / "tests" / "data" / "photos"
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


@dataclass
class Totals:
    """All rounds of one way at one concurrency."""

    rates: list[float] = field(default_factory=list)
    each: list[float] = field(default_factory=list)
    medians: list[float] = field(default_factory=list)
    client: list[float] = field(default_factory=list)
    server: list[float] = field(default_factory=list)

    def add(self, taken: Taken) -> None:
        count = len(taken.each)
        self.rates.append(count / taken.wall)
        self.each += taken.each
        self.medians.append(float(np.median(taken.each)))
        self.client.append(1000 * taken.client / count)
        self.server.append(1000 * taken.server / count)


def files(size: int) -> list[bytes]:
    """Real images as JPEG files of ``size`` pixels a side."""
    found = []
    for photo in sorted(PHOTOS.glob("*.png")):
        Image.open(photo).convert("RGB").resize((size, size)).save(out := io.BytesIO(), "jpeg", quality=90)
        found.append(out.getvalue())
    return found


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


async def ask(
    url: httpx.URL, headers: dict[str, str], images: list[bytes], concurrency: int, count: int
) -> list[float]:
    """Seconds of each of ``count`` requests over ``concurrency`` connections, with next to no work on this side."""
    head = [f"POST {url.path} HTTP/1.1", f"Host: {url.host}", "Content-Type: image/jpeg"]
    head += [f"{name}: {value}" for name, value in headers.items()]
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


def over_http(url: str, headers: dict[str, str], root: int, images: list[bytes], concurrency: int, count: int) -> Taken:
    before, cpu, begin = processor_seconds(root), time.process_time(), time.perf_counter()
    each = asyncio.run(ask(httpx.URL(url), headers, images, concurrency, count))
    wall = time.perf_counter() - begin
    return Taken(wall, each, time.process_time() - cpu, processor_seconds(root) - before)


@contextmanager
def asgi(store: Path) -> Iterator[tuple[str, int]]:
    """The ASGI front end as its command starts it: where to post, and the supervisor's pid."""
    command = [sys.executable, "-m", "cascade.cli", "serve", "--frontend", "asgi", "--port", "0"]
    options = ["--model-store", str(store), "--log-level", "warning", "--max-batch", str(MOST)]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        try:
            if not line.startswith("ready"):
                raise SystemExit("the ASGI front end does not start: its reason stands above")
            yield line.split()[-1], process.pid
        finally:
            process.terminate()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--backbone", default="resnet50")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--requests", type=int, default=96, help="in a round, at each concurrency")
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    chosen = options.parse_args()
    totals = {(way, c): Totals() for way in (ENGINE, ASGI, TORCHSERVE) for c in CONCURRENCIES}
    with ExitStack() as stack:
        store = Path(stack.enter_context(TemporaryDirectory(prefix="cascade-http-")))
        bundle = write(single(backbones.load(chosen.backbone, "random:0"), "bench", 0), store / "bench" / "1")
        images = files(load(bundle).find("bench").preprocessing.size)  # type: ignore[union-attr]
        torchserve = stack.enter_context(Server(store, auth=False, threads=chosen.threads))
        asgi_url, asgi_pid = stack.enter_context(asgi(store))
        pipe, theirs = multiprocessing.get_context("spawn").Pipe()
        arguments = (bundle, images, chosen.threads, theirs)
        peer = multiprocessing.get_context("spawn").Process(target=engine_peer, args=arguments, daemon=True)
        peer.start()
        pipe.recv()
        for round_ in range(-1, chosen.rounds):  # the first one only warms up
            for c in CONCURRENCIES:
                count = max(chosen.requests // 4, 8) if c == 1 else chosen.requests
                pipe.send((c, count))
                taken = {ENGINE: pipe.recv()}
                taken[ASGI] = over_http(asgi_url, {}, asgi_pid, images, c, count)
                taken[TORCHSERVE] = over_http(torchserve.url, {}, torchserve.java.pid, images, c, count)
                for way, each in taken.items():
                    if round_ >= 0:
                        totals[way, c].add(each)
        pipe.send(None)
        peer.join()
    show(chosen.backbone, totals)


def show(backbone: str, totals: dict[tuple[str, int], Totals]) -> None:
    """The table and the figures."""
    title = f"{backbone}, JPEG files, one mask; CPU ms are processor time for an image"
    table = Table("way", "at a time", "images/s", "p50 ms", "p95", "p99", "CPU ms server", "CPU ms client", title=title)
    figures: dict[str, Figure] = {}
    for (way, c), total in totals.items():
        p50, p95, p99 = (1000 * float(np.percentile(total.each, p)) for p in (50, 95, 99))
        rate = figure(total.rates)
        cpu = [f"{np.median(each):.1f}" for each in (total.server, total.client)]
        table.add_row(way, str(c), f"{rate.value:.1f}", f"{p50:.1f}", f"{p95:.1f}", f"{p99:.1f}", *cpu)
        slug = way.replace(" ", "_").lower()
        figures[f"images_per_second_{slug}_{c}"] = rate
        figures[f"p50_ms_{slug}_{c}"] = figure([1000 * s for s in total.medians])
        figures[f"p99_ms_{slug}_{c}"] = figure([p99])
        if way != ENGINE:
            ratios = [a / b for a, b in zip(total.rates, totals[ENGINE, c].rates, strict=True)]
            figures[f"throughput_{slug}_{c}"] = figure(ratios, ">= 0.9" if c == 32 else None)
    for way, goal in ((ASGI, "<= 3"), (TORCHSERVE, "<= 5")):
        pairs = zip(totals[way, 1].medians, totals[ENGINE, 1].medians, strict=True)
        figures[f"added_ms_{way.lower()}_1"] = figure([1000 * (a - b) for a, b in pairs], goal)
    report(f"http-{backbone}", figures, table)


if __name__ == "__main__":
    main()
