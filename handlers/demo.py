"""Serve a model store for a moment with both front ends: real images in, a table out, and everything stopped again.

python -m handlers.demo [IMAGES] [--store model_store]
"""

import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cascade.errors import CascadeError
from handlers import process
from handlers.signals import deferred, exit_on_signals
from handlers.torchserve.entrypoint import Server

ROOT = process.ROOT
PHOTOS, STORE = ROOT / "tests" / "data" / "photos", ROOT / "model_store"
TYPES = {".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png", ".webp": "image/webp"}
METRICS = ("cascade_requests_total", "cascade_mask_", "cascade_backbone", "cascade_materialized")
READY = re.compile(r"^ready: .* (http://\S+)$", re.MULTILINE)
TOLERANCE = 1e-3  # of scores: the servers may batch the images differently


class DemoError(CascadeError):
    """There is no image to send, an image was not answered, or the servers disagree."""


def answers(url: str, images: list[Path], headers: dict[str, str]) -> Iterator[tuple[dict[str, Any], float]]:
    """Post one image after the other; yields each answer and the seconds it took. Raises DemoError."""
    with httpx.Client(trust_env=False, timeout=60, headers=headers) as client:
        for image in images:
            body, content_type = image.read_bytes(), TYPES[image.suffix.lower()]
            start = time.perf_counter()
            response = client.post(url, content=body, headers={"Content-Type": content_type})
            seconds = time.perf_counter() - start
            if response.status_code != 200:
                raise DemoError(f"{image.name}: status {response.status_code}: {response.text}")
            yield response.json(), seconds


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

    def __exit__(self, *exc: object) -> None:
        self._process.terminate()
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


def row(image: Path, answer: dict[str, Any], seconds: float, asgi_seconds: float) -> list[str]:
    """The cells of one image, about two lines each, so that the table fits 80 columns."""
    label = [f"{best['name']}\n{best['score']:.2f}" for best in answer["labels"][:1]]
    nearest = [f"{n['label'] or n['name']} {n['similarity']:.2f}" for n in answer["neighbors"][:2]]
    numbers = [str(answer["cluster"]), *(f"{answer[key]:.2f}" for key in ("confidence", "ood"))]
    texts = ["\n".join(lines) or "-" for lines in (label, nearest, answer["masks"])]
    return [image.stem, *numbers, *texts, f"{1000 * seconds:.0f}\n{1000 * asgi_seconds:.0f}"]


def same(one: Any, other: Any) -> bool:
    """Whether two JSON answers are equal, up to rounding of their numbers."""
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float):
        return math.isclose(one, other, abs_tol=TOLERANCE)
    return bool(one == other)


def show(torchserve: Server, asgi_url: str, images: list[Path], console: Console) -> None:
    """Print the table, the addresses, and what the metrics say about the masks. Raises DemoError."""
    caption = "conf.: calibrated probability of the cluster; ood: out-of-domain score, 0 to 1; ms: TorchServe, ASGI"
    table = Table(box=SIMPLE_HEAD, show_lines=True, collapse_padding=True, pad_edge=False, caption=caption)
    for name in ("image", "cluster", "conf.", "ood", "label", "nearest", "masks", "ms"):
        table.add_column(name, justify="right" if name == "ms" else "left", no_wrap=name == "image")
    both = zip(answers(torchserve.url, images, torchserve.headers), answers(asgi_url, images, {}), strict=True)
    for image, ((answer, seconds), (asgi_answer, asgi_seconds)) in zip(images, both, strict=True):
        if not same(answer, asgi_answer):
            raise DemoError(f"{image.name}: TorchServe answers {answer}, ASGI {asgi_answer}")
        table.add_row(*row(image, answer, seconds, asgi_seconds))
    console.print(table)
    console.print(f"TorchServe and ASGI give the same answers to all {len(images)} images")
    console.print(f"endpoint  {torchserve.url}\n          {asgi_url}\nmetrics   {torchserve.metrics_url}")
    metrics = httpx.get(torchserve.metrics_url, headers=torchserve.headers, trust_env=False).raise_for_status().text
    for line in sorted(metrics.splitlines()):
        if line.startswith(METRICS):
            console.print(f"  {line}", soft_wrap=True)


def main(
    images: Annotated[Path, typer.Argument(help="Folder of JPEG, PNG or WebP images.")] = PHOTOS,
    store: Annotated[Path, typer.Option(help="Folder of bundles, <name>/<version>/.")] = STORE,
) -> None:
    """Start TorchServe and the ASGI server on free ports of loopback, send both the same images, and stop them."""
    exit_on_signals(status=130)
    console = Console(highlight=False)
    try:
        paths = sorted(path for path in images.glob("*") if path.suffix.lower() in TYPES)
        if not paths:
            raise DemoError(f"no image in {images}: name a folder of JPEG, PNG or WebP files")
        with ExitStack() as stack:
            start = time.perf_counter()
            with console.status("starting TorchServe and the ASGI server"):
                torchserve = Server(store)  # which checks the store before anything starts
                asgi = stack.enter_context(AsgiServer(store))
                stack.enter_context(torchserve)
                url = asgi.url
            console.print(f"ready after {time.perf_counter() - start:.1f} s")
            show(torchserve, url, paths, console)
            stack.enter_context(console.status("stopping the servers"))
    except (CascadeError, httpx.HTTPError, OSError) as e:
        print(f"demo: {e}", file=sys.stderr)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    typer.run(main)
