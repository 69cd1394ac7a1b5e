"""Our TorchServe handler with N masks over TorchServe with N models; JPEG over HTTP."""

import atexit
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from PIL import Image
from safetensors.torch import save_file

from benchmarks import synthetic
from benchmarks.report import Figure, Rows, figure, single
from benchmarks.serving.baselines import copy_of
from benchmarks.serving.mixed import HELD
from benchmarks.subprocesses import peers, ratios, rounds
from cascade.bundle.format import write
from handlers.torchserve.entrypoint import Server

CONCURRENCY, REQUESTS = 8, 48
MANIFEST = {
    "runtime": "python",
    "model": {"modelVersion": "1.0", "handler": "benchmarks.serving.copy_handler", "configFile": "model-config.yaml"},
    "archiverVersion": "0.12.0",
    "createdOn": "01/01/2026 00:00:00",
}


class Copies(Server):
    """The same server with a copy of the weights for each model, each in a worker with one thread."""

    def __init__(self, store: Path, weights: list[Path], backbone: str) -> None:
        super().__init__(store, auth=False, threads=1, poll=0)
        self.weights, self.backbone, self.workers = weights, backbone, len(weights)

    def _fill_folder(self) -> None:
        super()._fill_folder()
        shutil.rmtree(self.folder / "models" / "cascade")
        for i, weights in enumerate(self.weights):
            model = self.folder / "models" / f"m{i}"
            model.joinpath("MAR-INF").mkdir(parents=True)
            about = MANIFEST | {"model": {**MANIFEST["model"], "modelName": f"m{i}"}}  # type: ignore[dict-item]
            model.joinpath("MAR-INF", "MANIFEST.json").write_text(json.dumps(about))
            copy = json.dumps({"backbone": self.backbone, "weights": str(weights), "threads": 1})
            model.joinpath("model-config.yaml").write_text(
                "minWorkers: 1\nmaxWorkers: 1\nbatchSize: 8\nmaxBatchDelay: 1\nresponseTimeout: 120\n"
                f"startupTimeout: 120\ndeviceType: cpu\ncopy: {copy}\n"
            )
        config = self.folder / "config.properties"
        names = ",".join(f"m{i}" for i in range(len(self.weights)))
        config.write_text(config.read_text().replace("load_models=cascade", f"load_models={names}"))

    def _describe(self) -> list[dict[str, Any]]:
        urls = [self.management_url.replace("models/cascade", f"models/m{i}") for i in range(len(self.weights))]
        found = []
        for url in urls:
            try:
                found += self.client.get(url).raise_for_status().json()[0]["workers"]
            except (httpx.HTTPError, ValueError):
                return []
        return found

    def _drain(self) -> None:
        """Nothing to wait for: the last request was answered."""


def build(way: str, name: str, models: int, store: Path, weights: list[Path]) -> Callable[[list[int]], int]:
    """Start a server. The returned work sends it a request for each model and returns its memory in bytes."""
    budget = HELD * synthetic.mask_bytes(synthetic.load(name))
    masks = way == "masks"
    server = Server(store, auth=False, budget_bytes=budget, poll=0) if masks else Copies(store, weights, name)
    stack = ExitStack()
    stack.enter_context(server)
    atexit.register(stack.close)
    draw = np.random.default_rng(0)
    bodies = [_jpeg(Image.fromarray(draw.integers(0, 256, (224, 224, 3), np.uint8))) for _ in range(8)]

    def address(model: int) -> tuple[str, dict[str, str]]:
        if masks:
            return server.url, {"X-Cascade-Bundle": f"m{model}"}
        return server.url.replace("predictions/cascade", f"predictions/m{model}"), {}

    def work(wanted: list[int]) -> int:
        _send([address(model) for model in wanted], bodies)
        return _memory(server)

    return work


def measure(name: str, models: int, count: int, rows: Rows) -> dict[str, Figure]:
    draw = np.random.default_rng(0)
    works = [draw.integers(models, size=REQUESTS).tolist() for _ in range(count)]
    with _prepared(name, models) as (store, weights):
        ways = {way: (build, way, name, models, store, weights) for way in ("masks", "copies")}
        with peers(ways) as running:
            seconds = rounds(running, works)
            memory = {way: peer.time(works[0])[1] for way, peer in running.items()}
    texts = {"masks": f"one TorchServe worker, {models} masks", "copies": f"{models} TorchServe models, a worker each"}
    for way, taken in seconds.items():
        rows.add(texts[way], figure([1000 * s / REQUESTS for s in taken]), "ms a request", memory[way])
    return {
        "over_torchserve_n_models": figure(ratios(seconds["copies"], seconds["masks"]), "> 1"),
        "over_torchserve_n_models_memory": single(memory["copies"] / memory["masks"], "> 1"),
    }


def _send(addresses: list[tuple[str, dict[str, str]]], bodies: list[bytes]) -> None:
    with httpx.Client(trust_env=False, timeout=120) as client, ThreadPoolExecutor(CONCURRENCY) as pool:

        def one(nth: int) -> None:
            url, headers = addresses[nth]
            headers = headers | {"Content-Type": "image/jpeg"}
            client.post(url, content=bodies[nth % len(bodies)], headers=headers).raise_for_status()

        list(pool.map(one, range(len(addresses))))


def _memory(server: Server) -> int:
    """Proportional memory (PSS) of Java and all workers."""
    java = psutil.Process(server.java.pid)
    return sum(int(p.memory_full_info().pss) for p in (java, *java.children(recursive=True)))


@contextmanager
def _prepared(name: str, models: int) -> Iterator[tuple[Path, list[Path]]]:
    """Write a store with one mask per bundle, and the same models as full weight files."""
    backbone = synthetic.load(name)
    with tempfile.TemporaryDirectory(prefix="cascade-copies-") as folder:
        store, weights = Path(folder, "store"), []
        for i in range(models):
            bundle = synthetic.single(backbone, f"m{i}", i)
            write(bundle, store / f"m{i}" / "1")
            weights.append(Path(folder, f"{i}.safetensors"))
            save_file(copy_of(backbone, bundle.dispatcher).state_dict(), weights[-1])
        yield store, weights


def _jpeg(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=90)
    return out.getvalue()
