"""Throughput of traffic for many bundles over that for one, measured in a few seconds on a running ASGI server."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle, islice
from statistics import harmonic_mean
from typing import Any

from cascade.client import Client
from handlers.demo_images import Sample

SECONDS = 2.0  # and about one until the last requests are answered
ROUNDS = 2
IMAGES = 16  # of a request


@dataclass(frozen=True)
class Rates:
    """Images a second.

    Attributes:
        bundles: names of those that take part.
        mixed: requests for all of them at once. single: for one at a time, the mean over all of them.
    """

    bundles: list[str]
    mixed: float
    single: float


def measure(url: str, bundles: Sequence[dict[str, Any]], samples: Sequence[Sample]) -> Rates | None:
    """Compare the bundles of one input size that images can be dispatched to; None where there are not two.

    Every request has the same images and names its bundle, and as many are on their way at a time in both cases.

    Args:
        bundles: of the server's overview.
    """
    of_size: dict[int, list[str]] = {}
    for bundle in bundles:
        if bundle["dispatched"] and bundle["name"] not in of_size.setdefault(bundle["size"], []):
            of_size[bundle["size"]].append(bundle["name"])
    names = max(of_size.values(), key=len, default=[])
    if len(names) < 2:
        return None
    images = [*islice(cycle(s.content for s in samples if s.bundle is None), IMAGES)]
    with Client(url) as client:
        for name in names:
            client.infer(images, name)
        # Of interleaved rounds the best, because other work on the machine only adds time.
        mixed, alone = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
        for _ in range(ROUNDS):
            for name in names:
                mixed[name] = max(mixed[name], _rate(client, images, names))
                alone[name] = max(alone[name], _rate(client, images, [name] * len(names)))
    return Rates(names, harmonic_mean(mixed.values()), harmonic_mean(alone.values()))


def _rate(client: Client, images: list[bytes], names: list[str]) -> float:
    """Images a second with one thread for each name, which sends one request after the other."""
    start, seconds = time.perf_counter(), SECONDS / (2 * ROUNDS * len(names))

    def send(name: str) -> tuple[int, float]:
        sent = 0
        while time.perf_counter() - start < seconds:
            client.infer(images, name, outputs=["label"])
            sent += len(images)
        return sent, time.perf_counter()

    with ThreadPoolExecutor(len(names)) as pool:
        done = list(pool.map(send, names))
    return sum(sent for sent, _ in done) / (max(end for _, end in done) - start)
