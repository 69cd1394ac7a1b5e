"""gRPC against HTTP on one server: pixels as tensors, by Triton's own clients.

    python -m benchmarks.grpc_http                                          # ResNet-50
    python -m benchmarks.grpc_http --backbone test_resnet --requests 64     # a quick look

The bundle is one mask over the whole backbone, with seeded random weights. Each request carries one preprocessed image
in binary form. Both are asyncio clients in this process, which shares the cores with the server. Rounds are
interleaved; the first one is a warm-up.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.report import Rows, figure, report
from benchmarks.subprocesses import serving
from benchmarks.synthetic import executor_name, load, single
from cascade.bundle.format import write
from cascade.model.preprocessing import Preprocessing
from handlers.signals import exit_on_signals
from handlers.torchserve.entrypoint import LOOPBACK, claim_ports

CONCURRENCY = 32
BUNDLE = "pixels"
Ask = Callable[[np.ndarray], Awaitable[np.ndarray]]
"""Send pixels float32 [1, 3, H, W]; returns the embedding float32 [1, D]."""


@asynccontextmanager
async def client(module: Any, address: str, **options: Any) -> AsyncIterator[Ask]:
    """Triton's asyncio client for HTTP or gRPC; ``module`` has its classes."""
    connection = module.InferenceServerClient(address, **options)

    async def ask(pixels: np.ndarray) -> np.ndarray:
        sent = module.InferInput("pixels", list(pixels.shape), "FP32")
        sent.set_data_from_numpy(pixels)
        answer = await connection.infer(BUNDLE, [sent], outputs=[module.InferRequestedOutput("embedding")])
        return np.asarray(answer.as_numpy("embedding"))

    try:
        yield ask
    finally:
        await connection.close()


async def throughput(ask: Ask, images: np.ndarray, requests: int) -> float:
    """Images per second with CONCURRENCY requests in progress."""
    pending, begun = iter(range(requests)), time.perf_counter()

    async def send() -> None:
        for n in pending:
            await ask(images[n % len(images)][None])

    await asyncio.gather(*(send() for _ in range(CONCURRENCY)))
    return requests / (time.perf_counter() - begun)


async def measured(http: str, rpc: str, images: np.ndarray, requests: int, rounds: int) -> dict[str, list[float]]:
    """Images per second of each client and round."""
    from tritonclient.grpc import aio as of_grpc
    from tritonclient.http import aio as of_http

    rates: dict[str, list[float]] = {"gRPC": [], "HTTP": []}
    async with (
        client(of_grpc, rpc) as by_grpc,
        client(of_http, http, conn_limit=CONCURRENCY, conn_timeout=600) as by_http,
    ):
        np.testing.assert_allclose(await by_grpc(images[:1]), await by_http(images[:1]), rtol=1e-5, atol=1e-6)
        asks = [("gRPC", by_grpc), ("HTTP", by_http)]
        for nth in range(-1, rounds):
            for name, ask in asks[:: 1 if nth % 2 else -1]:
                rate = await throughput(ask, images, requests)
                if nth >= 0:
                    rates[name].append(rate)
    return rates


def main(
    backbone: str = "resnet50",
    requests: Annotated[int, typer.Option(help="Of each round.")] = 256,
    rounds: int = 5,
    out: Annotated[
        Path | None, typer.Option(help="JSON file to write instead of the one in benchmarks/results.")
    ] = None,
) -> None:
    """Measure the throughput of gRPC and of HTTP."""
    exit_on_signals(1)  # stops the server and removes the folder
    network = load(backbone)
    side = Preprocessing.of(network.config).size
    images = np.random.default_rng(0).standard_normal((16, 3, side, side)).astype(np.float32)
    with TemporaryDirectory(prefix="cascade-grpc-") as folder:
        write(single(network, BUNDLE, 0), Path(folder, BUNDLE, "1"))
        (port,) = claim_ports((LOOPBACK, 0))
        with serving(Path(folder), "--grpc-port", str(port), "--log-level", "warning") as url:
            http, rpc = f"{url.host}:{url.port}", f"{LOOPBACK}:{port}"
            rates = asyncio.run(measured(http, rpc, images, requests, rounds))
    rows = Rows(f"{backbone}, {CONCURRENCY} at a time, pixels as tensors")
    for name, values in rates.items():
        rows.add(name, figure(values), "images/s")
    ratios = [a / b for a, b in zip(rates["gRPC"], rates["HTTP"], strict=True)]
    report(
        f"grpc-{backbone}",
        {"grpc_over_http": figure(ratios, ">= 1")},
        rows.table,
        executor=executor_name(backbone),
        out=out,
    )


if __name__ == "__main__":
    typer.run(main)
