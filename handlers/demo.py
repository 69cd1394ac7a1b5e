"""Serve a model store for a moment with both front ends: real images in, a table out, and everything stopped again.

python -m handlers.demo [IMAGES] [--store model_store]
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console

from cascade.client import Client
from cascade.errors import CascadeError
from handlers import demo_report, demo_traffic, process
from handlers.demo_images import DemoError, Sample, samples
from handlers.signals import deferred, exit_on_signals
from handlers.torchserve.entrypoint import Server

WIDTH = 100  # columns, where the output goes into a pipe
STORE = process.ROOT / "model_store"
READY = re.compile(r"^ready: .* (http://\S+)$", re.MULTILINE)


class AsgiServer:
    """``cascade serve`` on a free port of loopback, as a process of its own.

    Entering starts it, leaving ends it; in between, ``url`` waits until it is ready.
    """

    def __init__(self, store: Path) -> None:
        arguments = ["serve", "--port", "0", "--log-level", "error", "--model-store", str(store.resolve())]
        self._command = process.python("cascade.cli.main", *arguments)

    def __enter__(self) -> "AsgiServer":
        self._output = tempfile.TemporaryFile("w+b")
        with deferred():
            self._process = process.start(
                self._command, process.environment(), stdout=self._output, stderr=self._output
            )
        return self

    def stop(self) -> None:
        """Tell it to end, and do not wait: leaving does."""
        self._process.terminate()

    def __exit__(self, *exc: object) -> None:
        self.stop()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(15)
        process.kill(self._process)
        self._output.close()

    @property
    def url(self) -> str:
        """Where images are posted. Raises DemoError."""
        while not (ready := READY.search(self._written())):
            if self._process.poll() is not None:
                raise DemoError(f"the ASGI server does not start: {self._written()[-300:]}")
            time.sleep(0.05)
        return ready[1]

    def _written(self) -> str:
        return os.pread(self._output.fileno(), 2**16, 0).decode(errors="replace")


def _overview(url: str) -> dict[str, Any]:
    """What the ASGI server at ``url`` has loaded. Raises httpx.HTTPError."""
    page = httpx.URL(url).copy_with(path="/v1/overview")
    return dict(httpx.get(page, trust_env=False, timeout=60).raise_for_status().json())


def _count(samples: list[Sample], asgi: AsgiServer) -> list[demo_report.Answered]:
    """The answers to images with a known label, as soon as the server is ready. Raises DemoError."""
    with Client(asgi.url) as client:
        return demo_report.count([sample for sample in samples if sample.label and not sample.bundle], client)


def main(
    images: Annotated[
        Path | None,
        typer.Argument(help="Folder of JPEG, PNG or WebP images; test images of all customers by default."),
    ] = None,
    store: Annotated[Path, typer.Option(help="Folder of bundles, <name>/<version>/.")] = STORE,
) -> None:
    """Start TorchServe and the ASGI server on free ports of loopback, send both the same images, and stop them."""
    exit_on_signals(status=130)
    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = Console(highlight=False, width=None if known else WIDTH)
    os.environ.setdefault("CASCADE_EXECUTOR", "folded")  # which is ready soonest; a server of days takes the fastest
    try:
        every = samples(images)
        with ExitStack() as stack:
            pool = stack.enter_context(ThreadPoolExecutor(1))
            start = time.perf_counter()
            with console.status("starting TorchServe and the ASGI server"):
                torchserve = Server(store)  # which checks the store before anything starts
                asgi = stack.enter_context(AsgiServer(store))
                counting = pool.submit(_count, every, asgi)  # while TorchServe starts, which takes longer
                stack.enter_context(torchserve)
                url = asgi.url
            console.print(f"TorchServe and the ASGI server were ready after {time.perf_counter() - start:.1f} s")
            with console.status("counting right labels"):
                counted = counting.result()
            token = torchserve.headers["Authorization"].removeprefix("Bearer ")
            first = stack.enter_context(Client(torchserve.url, key=token))
            second = stack.enter_context(Client(url))
            overview = _overview(url)
            served = [None, *(bundle["name"] for bundle in overview["bundles"])]
            asked = [sample for sample in every if sample.bundle in served]
            answers = demo_report.show([sample for sample in asked if sample.shown], first, second, console)
            with console.status("measuring the throughput"):
                rates = demo_traffic.measure(url, overview["bundles"], asked)
            demo_report.summary(overview, answers, counted, rates, console)
            stack.enter_context(console.status("stopping the servers"))
            asgi.stop()  # while TorchServe ends, whose block is left first
    except (CascadeError, httpx.HTTPError, OSError) as e:
        print(f"demo: {e}", file=sys.stderr)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    typer.run(main)
