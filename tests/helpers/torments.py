"""What is done to servers in the survival tests: to their disk, their clock and their store; and what is measured."""

import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import threading
import time
from calendar import timegm
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

import httpx
import numpy as np
import psutil
import pytest

from tests.conftest import need
from tests.helpers.servers import CLIENT, Running

HERE = Path(__file__).parent
MIB = 2**20
NO_FILES = {"CASCADE_EXECUTOR": "folded", "PYTHONDONTWRITEBYTECODE": "1"}
"""For a server whose disk is to be `full_disk`: ONNX Runtime writes a file in memory, which the limit counts, too, and
Python 3.11 would leave cut-off bytecode for later tests."""
DAY = 86_400


def short_and_whole(short: object, whole: object) -> list[object]:
    """Both sizes of a test; the second one runs with ``make soak`` only."""
    return [short, pytest.param(whole, marks=pytest.mark.soak)]


def settled(condition: Callable[[], object], seconds: float) -> bool:
    """Whether it holds, now or within that time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def until(condition: Callable[[], object], seconds: float = 120) -> None:
    """Wait until it holds."""
    assert settled(condition, seconds), "it never came"


def said(server: Running) -> list[dict[str, str]]:
    """The lines of its log that are JSON: all, but for a last word. A line may come after what it tells of is seen."""
    lines = (server.folder / "stderr").read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("\n")]


def told_of(server: Running, begin: str) -> list[dict[str, str]]:
    """The lines of its log whose message begins so, once there is one."""

    def found() -> list[dict[str, str]]:
        return [line for line in said(server) if line["message"].startswith(begin)]

    until(found)
    return found()


def put(bundle: Path, there: Path) -> None:
    """A copy of a bundle in a store that is followed, there in one moment."""
    aside = there.parents[1] / f".{there.parent.name}-{there.name}"
    shutil.copytree(bundle, aside)
    there.parent.mkdir(exist_ok=True)
    aside.rename(there)


def take(there: Path) -> None:
    """Away from a store that is followed in one moment: a bundle, or all of a name."""
    aside = there.with_name(f".{there.name}-gone")
    there.rename(aside)
    shutil.rmtree(aside)


# The end


@dataclass(eq=False)
class Asked:
    """A request: ``sent`` when its last byte is with the kernel, ``status`` in the end, 0 for a broken connection."""

    sent: bool = False
    status: int | None = None

    def ask(self, server: Running, token: dict[str, str], image: bytes) -> int:
        def trace(event: str, about: object) -> None:
            self.sent |= event == "http11.send_request_body.complete"

        try:
            headers = token | {"Content-Type": "image/png", "X-Cascade-Bundle": "one"}
            answer = CLIENT.post(server.url, content=image, headers=headers, extensions={"trace": trace})
            self.status = answer.status_code
        except httpx.TransportError:
            self.status = 0
        return self.status


def terminated(server: Running, photos: list[bytes], large: bytes) -> str:
    """SIGTERM while eight clients ask without a pause and four requests of a second's work or so are in progress.

    What was sent half a second before must be answered, and the rest be answered or refused. Says what was seen.
    """
    asked: list[Asked] = []
    over = threading.Event()
    token = server.headers  # its file goes before the last answers come

    def client(image: bytes) -> None:
        status = 200
        while status == 200 and not over.is_set():
            asked.append(each := Asked())
            status = each.ask(server, token, image)

    with ThreadPoolExecutor(12) as pool, ExitStack() as stack:
        stack.callback(over.set)
        for image in photos[:8]:
            pool.submit(client, image)
        until(lambda: sum(each.status == 200 for each in asked) > 16)
        long = [Asked() for _ in range(4)]
        for each in long:
            pool.submit(each.ask, server, token, large)
        until(lambda: all(each.sent for each in long))
        early = [*long, *(each for each in asked if each.sent)]
        for _ in range(10):
            time.sleep(0.05)  # a machine that stands still for a while does so in one of them
        told = time.monotonic()
        assert server.end(signal.SIGTERM, within=180) == 0
        seconds = time.monotonic() - told
    assert {each.status for each in early} == {200} and len(early) > 16
    late = Counter(each.status for each in asked if each not in early)
    assert late.keys() <= {200, 503, 0}, late
    return f"SIGTERM: {len(early)} sent before it, all answered; from then on {dict(late)}; ended after {seconds:.1f} s"


# The disk


@contextmanager
def full_disk(server: Running, *only: int) -> Iterator[None]:
    """No process of the server (or of its processes ``only`` these), nor one started by it, can make a file longer.

    A limit on the length of files needs no rights and no disk of its own. Its error is EFBIG where a full disk's is
    ENOSPC, and both are an OSError of the same system calls. A few bytes pass: Python looks for a temporary folder by
    writing four, and the tests' own libraries (dill, which torch imports where it is) do not start without one.
    """

    def limit(size: int) -> None:
        for _ in range(2):  # again: one may just have been started
            for pid in only or server.processes():
                with suppress(ProcessLookupError):  # one may just have ended
                    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    limit(64)
    try:
        yield
    finally:
        limit(resource.RLIM_INFINITY)


@contextmanager
def small_disk(path: Path) -> Iterator[Callable[[], None]]:
    """A disk of 64 MiB at ``path``; calling what it gives fills it to the last block."""
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", path], capture_output=True, text=True)

    def fill() -> None:
        with (path / "filling").open("ab", buffering=0) as file:
            for size in (2**20, 2**12, 1):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    continue

    try:
        need(mounted.returncode == 0, f"a disk can't be mounted here: {mounted.stderr}")
        yield fill
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", path], check=True)
        path.rmdir()


# The clock


class Clock:
    """The wall clock of a server that is started with ``environment``.

    Args:
        reach: "python" moves what Python programs see; "all" moves Java's, too, and needs a C compiler.
    """

    def __init__(self, folder: Path, reach: Literal["python", "all"] = "python") -> None:
        self._file = folder / "clock"
        self._file.write_bytes(bytes(8))
        self.environment = {"CLOCK": str(self._file)}
        if reach == "python":
            self.environment["PYTHONPATH"] = str(HERE / "clock")
        else:
            compiler = shutil.which("cc")
            need(compiler, "no C compiler: apt-get install gcc")
            library = folder / "clock.so"
            subprocess.run([str(compiler), "-shared", "-fPIC", HERE / "clock/clock.c", "-o", library], check=True)
            self.environment["LD_PRELOAD"] = str(library)

    def set(self, ahead: int) -> None:
        """Seconds from the true time."""
        with self._file.open("r+b") as file:
            file.write(struct.pack("q", ahead))


def jumps(server: Running, clock: Clock, shelf: Path) -> None:
    """Let the clock jump to and fro; each time a bad bundle that comes into the store must be seen, and its going."""
    good = next(shelf.glob("*/1"))
    for days in (400, -4000, 0):
        clock.set(days * DAY)
        name = f"late{days}"
        shutil.copytree(good, shelf / ".late" / "1")
        os.truncate(shelf / ".late" / "1" / "masks.safetensors", 1000)
        (shelf / ".late").rename(shelf / name)
        refused = f"cascade_bundle_refused{{bundle={name}}}"
        until(lambda refused=refused: server.metrics().get(refused) == 1)  # type: ignore[misc]
        (told,) = told_of(server, f"refused bundle {name}/1: ")
        seen = timegm(time.strptime(told["time"][:19], "%Y-%m-%dT%H:%M:%S")) - time.time()
        assert abs(seen - days * DAY) < DAY, "the log has the time that it was told"
        take(shelf / name)
        until(lambda refused=refused: server.metrics()[refused] == 0)  # type: ignore[misc]


# The store


class Shelf(SimpleHTTPRequestHandler):
    """A store behind HTTP; notes what is fetched, and can be out of order: 503, or not a word."""

    fetched: list[str] = []
    failing: Literal["503", "silence"] | None = None
    mended = threading.Event()

    def do_GET(self) -> None:
        if Shelf.failing == "503":
            self.send_error(503)
            return
        if Shelf.failing == "silence":
            Shelf.mended.wait()
            return
        if "safetensors" in self.path:
            Shelf.fetched.append(self.path)
        super().do_GET()

    def log_message(self, format: str, *args: object) -> None:
        pass

    @staticmethod
    def fail(how: Literal["503", "silence"]) -> None:
        Shelf.mended.clear()
        Shelf.failing = how

    @staticmethod
    def mend() -> None:
        Shelf.failing = None
        Shelf.mended.set()


@contextmanager
def remote(shelf: Path) -> Iterator[str]:
    """Serve a store over HTTP; gives the URL."""
    Shelf.fetched = []
    Shelf.mend()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Shelf, directory=shelf)) as store:
        thread = threading.Thread(target=store.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{store.server_port}"
        finally:
            Shelf.mend()
            store.shutdown()
            thread.join()


# Memory


def sampled(processes: dict[str, psutil.Process]) -> str:
    """Look at their memory for SOAK_MINUTES (ten), after half a minute's start; it must be flat. Says what was seen."""
    minutes = float(os.environ.get("SOAK_MINUTES", "10"))
    time.sleep(30)
    sizes: dict[str, list[float]] = {name: [] for name in processes}
    for _ in range(round(6 * minutes) - 3):
        time.sleep(10)
        for name, process in processes.items():
            sizes[name].append(process.memory_info().rss / MIB)
    slopes = {name: slope(each) for name, each in sizes.items()}
    assert max(slopes.values()) < 100, (slopes, sizes)
    return "; ".join(f"{name} {s[0]:.0f} to {s[-1]:.0f} MiB, {slopes[name]:+.1f} an hour" for name, s in sizes.items())


def slope(sizes: list[float]) -> float:
    """Of a line through samples ten seconds apart, an hour; the first third is the time to get warm."""
    settled = sizes[len(sizes) // 3 :]
    return float(np.polyfit(np.arange(len(settled)) * 10 / 3600, settled, 1)[0])
