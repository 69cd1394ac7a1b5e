"""``cascade serve``."""

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from cascade.cli.options import Executor, ExecutorKind


class Frontend(StrEnum):
    """Which server is around the engine."""

    torchserve = "torchserve"
    asgi = "asgi"
    ray = "ray"


class LogLevel(StrEnum):
    """From which level on ``cascade serve`` logs."""

    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


def serve(
    model_store: Annotated[str, typer.Option(help="Bundles, <name>/<version>: a folder or a URL.")] = "model_store",
    frontend: Annotated[Frontend, typer.Option(help="Which server; asgi and ray speak Open Inference Protocol v2.")] = (
        Frontend.torchserve
    ),
    host: Annotated[str, typer.Option(help="Address to listen on; loopback unless you say otherwise.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Of the predictions; asgi has /metrics on it, too.")] = 8080,
    budget: Annotated[int | None, typer.Option(help="Bytes of materialized masks, for each worker.", min=1)] = None,
    memory: Annotated[int | None, typer.Option(help="Bytes of backbones and bundles, for each worker.", min=1)] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    executor: Executor = ExecutorKind.auto,
    drain: Annotated[float, typer.Option(help="Seconds for requests in progress, once told to stop.", min=0)] = 8,
    metrics_port: Annotated[int, typer.Option(help="torchserve: of /metrics.")] = 8082,
    management_port: Annotated[int, typer.Option(help="torchserve: of the workers' state, on loopback.")] = 8081,
    workers: Annotated[
        int, typer.Option(help="Processes with a backbone each; ray: at most. asgi has one.", min=1)
    ] = 1,
    api_keys: Annotated[
        Path | None, typer.Option(help="asgi, ray: file of lines BUNDLE SHA256; none: no keys.")
    ] = None,
    max_batch: Annotated[int, typer.Option(help="asgi, ray: images in a pass at most.", min=1)] = 32,
    patience: Annotated[
        float, typer.Option(help="asgi, ray: seconds until the oldest image comes first.", min=0)
    ] = 0.05,
    queue: Annotated[int, typer.Option(help="asgi, ray: images that may wait; 503 for more.", min=1)] = 256,
    index: Annotated[Path | None, typer.Option(help="asgi: of cascade index build, for POST /v1/search.")] = None,
    connections: Annotated[int, typer.Option(help="asgi: connections at a time; 503 for more.", min=1)] = 4096,
    log_level: Annotated[
        LogLevel | None, typer.Option(help="info has a line a request; left out: warning for torchserve, else info.")
    ] = None,
    pin: Annotated[list[str] | None, typer.Option(help="NAME@VERSION for requests that name no version.")] = None,
    poll: Annotated[float, typer.Option(help="Seconds between two looks at the store; 0: never.", min=0)] = 10,
    auth: Annotated[
        bool, typer.Option("--auth/--no-auth", help="torchserve: whether a prediction needs a token.")
    ] = True,
    token_file: Annotated[
        Path | None, typer.Option(help="torchserve: where the token is written, for you alone.")
    ] = None,
) -> None:
    """Serve a model store: [bold]cascade serve --model-store model_store --frontend asgi[/]"""
    if executor is not ExecutorKind.auto:
        os.environ["CASCADE_EXECUTOR"] = executor.value  # the processes that hold engines inherit it
    pins: dict[str, str] = {}
    if pin:
        from cascade.engine.registry import pinned  # which loads torch: the process that supervises does without

        pins = pinned(pin)
    common: dict[str, Any] = {"host": host, "port": port, "budget_bytes": budget, "memory_bytes": memory}
    common |= {"device": device, "drain_timeout": drain, "pins": pins, "poll": poll}
    if frontend is Frontend.ray:
        from handlers.ray.serve import serve as serve_ray

        common |= {
            "max_batch": max_batch,
            "patience": patience,
            "queue": queue,
            "log_level": (log_level or LogLevel.info).value,
        }
        serve_ray(model_store, replicas=workers, api_keys=api_keys, **common)
        return
    if frontend is Frontend.asgi:
        from handlers.asgi.supervisor import serve as serve_asgi

        common |= {"max_batch": max_batch, "patience": patience, "queue": queue, "connections": connections}
        serve_asgi(model_store, api_keys=api_keys, index=index, log_level=(log_level or LogLevel.info).value, **common)
        return
    from handlers.torchserve.entrypoint import serve as serve_torchserve

    ports = {"metrics_port": metrics_port, "management_port": management_port}
    common |= {"auth": auth, "token_file": token_file, "log_level": (log_level or LogLevel.warning).value}
    serve_torchserve(model_store, workers=workers, **common, **ports)
