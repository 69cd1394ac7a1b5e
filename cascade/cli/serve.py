"""``cascade serve``."""

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from cascade.cli.options import Executor, ExecutorKind
from cascade.errors import CascadeError


class Frontend(StrEnum):
    """Servers that ``cascade serve`` can start."""

    asgi = "asgi"
    torchserve = "torchserve"
    ray = "ray"


class LogLevel(StrEnum):
    """Log levels of ``cascade serve``."""

    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


def _port(text: str) -> int:
    """Parse a port; refuse the address that Kubernetes puts into CASCADE_SERVE_PORT for a Service cascade-serve."""
    if not text.isdecimal():
        links = "; it comes from a Service of this name: set enableServiceLinks: false" if "://" in text else ""
        raise typer.BadParameter(f"{text!r} is no port{links}")
    return int(text)


def serve(
    context: typer.Context,
    frontend: Annotated[Frontend, typer.Option(help="The server: asgi and ray speak Open Inference Protocol v2.")] = (
        Frontend.asgi
    ),
    executor: Executor = ExecutorKind.auto,
    model_store: Annotated[str | None, typer.Option(help="Bundles, <name>/<version>: a folder or a URL.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; default: loopback.")] = None,
    port: Annotated[
        int | None,
        typer.Option(
            help="Port to listen on; default: 8080.",
            envvar=["PORT", "CASCADE_SERVE_PORT"],
            parser=_port,
            metavar="INTEGER",
        ),
    ] = None,
    no_auth: Annotated[
        bool | None, typer.Option("--no-auth", help="Accept requests without keys, on any address.")
    ] = None,
    budget_bytes: Annotated[
        int | None, typer.Option("--budget", help="Bytes of materialized masks, per worker.", min=1)
    ] = None,
    memory_bytes: Annotated[
        int | None, typer.Option("--memory", help="Bytes of backbones and bundles, per worker.", min=1)
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cpu.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads per worker; default: one per CPU.", min=1)] = None,
    pin: Annotated[
        list[str] | None,
        typer.Option(help="NAME@VERSION for requests that name no version; NAME@1:95,2:5 splits them."),
    ] = None,
    poll: Annotated[float | None, typer.Option(help="Seconds between polls of the store; 0: never.", min=0)] = None,
    startup_timeout: Annotated[
        float | None,
        typer.Option(help="asgi, torchserve: seconds until the engine must be ready; default: 300.", min=1),
    ] = None,
    drain_timeout: Annotated[
        float | None, typer.Option("--drain", help="Seconds to finish requests after a signal to stop.", min=0)
    ] = None,
    log_level: Annotated[LogLevel | None, typer.Option(help="info logs one line per request.")] = None,
    api_keys: Annotated[
        Path | None, typer.Option(help="asgi, ray: file with lines BUNDLE SHA256 [LIMIT=VALUE ...].")
    ] = None,
    max_batch: Annotated[int | None, typer.Option(help="asgi, ray: maximum images per pass.", min=1)] = None,
    patience: Annotated[
        float | None, typer.Option(help="asgi, ray: seconds after which the oldest image goes first.", min=0)
    ] = None,
    queue: Annotated[
        int | None, typer.Option(help="asgi, ray: maximum images waiting; 503 beyond that.", min=1)
    ] = None,
    time_slice: Annotated[
        float | None, typer.Option(help="asgi, ray: seconds that a pass with several images may take.", min=0)
    ] = None,
    on_demand: Annotated[
        bool | None,
        typer.Option("--on-demand", help="Load a bundle on its first request; evict by LRU."),
    ] = None,
    grpc_port: Annotated[int | None, typer.Option(help="asgi: port for gRPC beside HTTP; the extra grpc.")] = None,
    index: Annotated[Path | None, typer.Option(help="asgi: index for POST /v1/search.")] = None,
    keep_unknown: Annotated[
        Path | None, typer.Option(help="Folder that keeps images which fit no bundle, for the next one.")
    ] = None,
    keep_images: Annotated[int | None, typer.Option(help="Maximum images kept; default: 2000.", min=1)] = None,
    keep_bytes: Annotated[int | None, typer.Option(help="Maximum bytes kept; default: 256 MiB.", min=1)] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="asgi: PEM file of the certificate chain, for TLS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="asgi: PEM file of its private key, not encrypted.")] = None,
    cors_origins: Annotated[
        list[str] | None, typer.Option("--cors-origin", help="asgi, ray: origin of web pages that may read answers.")
    ] = None,
    connections: Annotated[int | None, typer.Option(help="asgi: maximum connections; 503 beyond that.", min=1)] = None,
    keep_alive: Annotated[
        float | None, typer.Option(help="asgi: seconds that an idle connection stays open; default: 75.", min=1)
    ] = None,
    allowed_hosts: Annotated[
        list[str] | None, typer.Option("--allowed-host", help="asgi, ray: Host to accept besides loopback's names.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="torchserve, ray: processes, each with its own backbone.", min=1)
    ] = None,
    metrics_port: Annotated[int | None, typer.Option(help="torchserve: port of /metrics.")] = None,
    management_port: Annotated[int | None, typer.Option(help="torchserve: port of the workers' state.")] = None,
    token_file: Annotated[Path | None, typer.Option(help="torchserve: where to write the token, mode 0600.")] = None,
) -> None:
    """Serve a model store: [bold]cascade serve --model-store model_store[/]

    An address that others can reach needs keys: [bold]cascade serve --host 0.0.0.0 --api-keys keys[/]
    """
    from handlers import settings

    if executor is not ExecutorKind.auto:
        os.environ["CASCADE_EXECUTOR"] = executor.value  # the processes that hold engines inherit it
    classes = {
        Frontend.asgi: settings.AsgiSettings,
        Frontend.torchserve: settings.TorchServeSettings,
        Frontend.ray: settings.RaySettings,
    }
    chosen = _settings(context, frontend, classes[frontend])
    if frontend is Frontend.asgi:
        from handlers.asgi.supervisor import serve as serve_asgi

        serve_asgi(chosen)
    elif frontend is Frontend.torchserve:
        from handlers.torchserve.entrypoint import serve as serve_torchserve

        options = chosen.options("no_auth", "startup_timeout")
        serve_torchserve(**options, auth=not chosen.no_auth, start_timeout=chosen.startup_timeout)
    else:
        from handlers.ray.serve import serve as serve_ray

        options = chosen.options("workers", "allowed_hosts")
        serve_ray(**options, replicas=chosen.workers, hosts=chosen.hosts)


def _settings(context: typer.Context, frontend: Frontend, settings: Any) -> Any:
    """The front end's settings from the command line; an option that it does not use is an error."""
    values: dict[str, Any] = {}
    for parameter in context.command.params:
        name = str(parameter.name)
        if name in ("frontend", "executor") or str(context.get_parameter_source(name)).endswith("DEFAULT"):
            continue
        if name != "pin" and name not in settings.__dataclass_fields__:
            raise CascadeError(f"{parameter.opts[0]} is no option of --frontend {frontend}: omit it")
        values[name] = context.params[name]
    if "log_level" in values:
        values["log_level"] = values["log_level"].value
    for name in {"allowed_hosts", "cors_origins"} & values.keys():
        values[name] = tuple(values[name])
    if "pin" in values:
        from cascade.engine.pins import pinned

        values["pins"] = pinned(values.pop("pin"))
    return settings(**values)
