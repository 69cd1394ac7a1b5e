"""Peers are alternatives that do the same work, each in a separate process, timed in interleaved rounds."""

import ctypes
import gc
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
import psutil
import torch

Work = Callable[[Any], object]
Build = Callable[..., Work]
OFF = 0.2  # of the calibration loop, from which on a round is repeated
TRIES = 4


class Peer:
    """A process that is built once and then does the work sent to it."""

    def __init__(self, build: Build, *arguments: Any) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs, build, arguments), daemon=False)
        self._process.start()
        theirs.close()
        self._receive()

    def grown(self) -> int:
        """Growth of the process in bytes since before the build."""
        self._pipe.send(resident_bytes)
        grown: int = self._receive()
        return grown

    def time(self, work: Any) -> tuple[float, Any]:
        """Seconds that the work took in the peer, and its result."""
        self._pipe.send(work)
        seconds, result = self._receive()
        return seconds, result

    def stop(self) -> None:
        """End the process; it cleans up after itself."""
        if self._process.is_alive():
            self._pipe.send(None)
            self._process.join(60)
        if self._process.is_alive():
            self._process.kill()
        self._process.join()

    def _receive(self) -> Any:
        try:
            found = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"a peer died with exit code {self._process.exitcode}") from None
        if isinstance(found, BaseException):
            raise found
        return found


@contextmanager
def peers(builds: dict[str, tuple[Any, ...]]) -> Iterator[dict[str, Peer]]:
    """Start one peer for each name, one after the other; stop all of them at the end."""
    running: dict[str, Peer] = {}
    try:
        for name, (build, *arguments) in builds.items():
            running[name] = Peer(build, *arguments)
        yield running
    finally:
        for peer in running.values():
            peer.stop()


def rounds(running: dict[str, Peer], works: Sequence[Any], warm: int = 1) -> dict[str, list[float]]:
    """Seconds of each peer for each of ``works``; the first ``warm`` of them run once before, uncounted, as a warm-up.

    A round is repeated if an idle loop before or after it is more than a fifth off its usual time.
    """
    seconds: dict[str, list[float]] = {name: [] for name in running}
    for work in works[:warm]:
        for peer in running.values():
            peer.time(work)
    usual = median(_calibrate() for _ in range(5))
    names = list(running)
    for nth, work in enumerate(works):
        turn = names[nth % len(names) :] + names[: nth % len(names)]  # nobody is always the first after the loop
        for attempt in range(TRIES):
            before = _calibrate()
            taken = {name: running[name].time(work)[0] for name in turn}
            if max(before, _calibrate()) < (1 + OFF) * usual or attempt == TRIES - 1:
                break
        for name, value in taken.items():
            seconds[name].append(value)
    return seconds


def ratios(a: list[float], b: list[float]) -> list[float]:
    """``a`` over ``b``, round by round."""
    return [x / y for x, y in zip(a, b, strict=True)]


def resident_bytes() -> int:
    """Resident memory of this process, after it has returned freed memory to the kernel."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


def _calibrate() -> float:
    """Seconds of a fixed loop on every core."""
    a = np.ones((400, 400), np.float32)
    begin = time.perf_counter()
    for _ in range(60):
        a @ a
    return time.perf_counter() - begin


def _serve(pipe: Connection, build: Build, arguments: tuple[Any, ...]) -> None:
    try:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        before = resident_bytes()
        work = build(*arguments)
        pipe.send(None)
        while (wanted := pipe.recv()) is not None:
            if wanted is resident_bytes:
                pipe.send(resident_bytes() - before)
                continue
            begin = time.perf_counter()
            result = work(wanted)
            pipe.send((time.perf_counter() - begin, result))
    except Exception as error:
        pipe.send(RuntimeError(f"{build.__name__}: {type(error).__name__}: {error}"))
        raise
    finally:
        pipe.close()


@contextmanager
def serving(store: Path, *options: str) -> Iterator[httpx.URL]:
    """Start the server by its command on a free port; yields the URL for requests."""
    command = [sys.executable, "-m", "cascade.cli.main", "serve", "--port", "0", "--model-store", str(store), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        try:
            if not line.startswith("ready"):
                raise SystemExit("the server does not start: see the error above")
            yield httpx.URL(line.split()[-1])
        finally:
            process.terminate()
