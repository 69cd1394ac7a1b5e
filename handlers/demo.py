"""Serve a model store for a moment: real images in, a table out, everything stopped again.

python -m handlers.demo [IMAGES] [--store model_store]
"""

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cascade.errors import CascadeError
from handlers.signals import exit_on_signals
from handlers.torchserve.entrypoint import Server

ROOT = Path(__file__).parents[1]
PHOTOS, STORE = ROOT / "tests" / "data" / "photos", ROOT / "model_store"
TYPES = {".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png", ".webp": "image/webp"}
SHOWN = ("cascade_requests_total", "cascade_mask_", "cascade_backbone", "cascade_materialized")


class DemoError(CascadeError):
    """There is nothing to send, or an image was not answered."""


def answers(url: str, images: list[Path], headers: dict[str, str]) -> Iterator[tuple[Path, dict[str, Any], float]]:
    """Post one image after the other; gives its path, the answer, the seconds it took. Raises DemoError."""
    with httpx.Client(trust_env=False, timeout=60, headers=headers) as client:
        for image in images:
            body, kind = image.read_bytes(), TYPES[image.suffix.lower()]
            start = time.perf_counter()
            response = client.post(url, content=body, headers={"Content-Type": kind})
            seconds = time.perf_counter() - start
            if response.status_code != 200:
                raise DemoError(f"{image.name}: status {response.status_code}: {response.text}")
            yield image, response.json(), seconds


def row(image: Path, answer: dict[str, Any], seconds: float) -> list[str]:
    """The table's texts for one answer, of two lines or so that fit a terminal of 80 columns."""
    label = [f"{best['name']}\n{best['score']:.2f}" for best in answer["labels"][:1]]
    near = [f"{each['label'] or each['name']} {each['similarity']:.2f}" for each in answer["neighbors"][:2]]
    numbers = [str(answer["cluster"]), *(f"{answer[key]:.2f}" for key in ("confidence", "ood"))]
    texts = ["\n".join(each) or "-" for each in (label, near, answer["masks"])]
    return [image.stem, *numbers, *texts, f"{1000 * seconds:.0f}"]


def show(server: Server, images: list[Path], console: Console) -> None:
    """Print the table, then where to go on from here, then what the metrics say of the swaps."""
    caption = "conf.: calibrated probability of the cluster; ood: out-of-domain score, 0 to 1"
    table = Table(box=SIMPLE_HEAD, show_lines=True, collapse_padding=True, pad_edge=False, caption=caption)
    for name in ("image", "cluster", "conf.", "ood", "label", "nearest", "masks", "ms"):
        table.add_column(name, justify="right" if name == "ms" else "left", no_wrap=name == "image")
    for each in answers(server.url, images, server.headers):
        table.add_row(*row(*each))
    console.print(table)
    console.print(f"endpoint  {server.url}\nmetrics   {server.metrics_url}")
    metrics = httpx.get(server.metrics_url, headers=server.headers, trust_env=False).raise_for_status().text
    for line in sorted(metrics.splitlines()):
        if line.startswith(SHOWN):
            console.print(f"  {line}", soft_wrap=True)


def main(
    images: Annotated[Path, typer.Argument(help="Folder of JPEG, PNG or WebP images.")] = PHOTOS,
    store: Annotated[Path, typer.Option(help="Folder of bundles, <name>/<version>/.")] = STORE,
) -> None:
    """Start TorchServe on free ports of loopback, send it images, show the answers, and stop it."""
    exit_on_signals(status=130)
    console = Console(highlight=False)
    try:
        found = sorted(path for path in images.glob("*") if path.suffix.lower() in TYPES)
        if not found:
            raise DemoError(f"no image in {images}: name a folder of JPEG, PNG or WebP files")
        with ExitStack() as stack:
            start = time.perf_counter()
            with console.status("starting TorchServe"):
                server = stack.enter_context(Server(store))
            console.print(f"ready after {time.perf_counter() - start:.1f} s")
            show(server, found, console)
            stack.enter_context(console.status("stopping TorchServe"))
    except (CascadeError, httpx.HTTPError, OSError) as e:
        print(f"demo: {e}", file=sys.stderr)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    typer.run(main)
