"""The settings of ``cascade serve``: shared ones, and those of each front end."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from cascade.errors import CascadeError

ORIGIN = re.compile(r"https?://[a-z0-9.-]+(:\d+)?|https?://\[[0-9a-f:]+\](:\d+)?")
"""As browsers send it: in lower case, without a path; ``*`` and ``null`` would let any page in."""


class SettingsError(CascadeError):
    """The settings contradict each other, or would give everyone access."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Shared by all front ends.

    Attributes:
        model_store: a folder of <name>/<version>/, or a URL for fsspec.
        no_auth: serve without keys on any address.
        budget_bytes: of materialized masks, per engine; None for the engine's default.
        memory_bytes: of backbones and bundles, per engine; None for no limit.
        threads: of torch, per engine; None for one per CPU.
        on_demand: of ``cascade.engine.stores.load_store``.
        keep_unknown: a folder in which images that fit no bundle are kept; None: they are not kept.
        keep_images, keep_bytes: most of them.
        pins: version by bundle name, for requests without a version.
        poll: seconds between two checks of the store, and of the index; 0 for never.
        drain_timeout: seconds for the requests in progress to finish, once told to stop.
        log_level: debug, info (a line per request), warning or error.

    Raises:
        SettingsError: the settings are invalid.
    """

    model_store: str = "model_store"
    host: str = "127.0.0.1"
    port: int = 8080
    no_auth: bool = False
    budget_bytes: int | None = None
    memory_bytes: int | None = None
    device: str = "cpu"
    threads: int | None = None
    on_demand: bool = False
    keep_unknown: Path | None = None
    keep_images: int = 2000
    keep_bytes: int = 2**28
    pins: dict[str, str] = field(default_factory=dict)
    poll: float = 10
    drain_timeout: float = 8
    log_level: str = "info"

    def options(self, *without: str) -> dict[str, Any]:
        """The settings by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in without}


@dataclass(frozen=True, kw_only=True)
class BatchingSettings(Settings):
    """Shared by the front ends with a batcher and API keys, ``asgi`` and ``ray``.

    Attributes:
        api_keys: a file for ``handlers.asgi.key_file.read``.
        allowed_hosts: Host headers to accept besides the names of loopback. Without keys on loopback all others are
            refused, since a web page can give its own name the address 127.0.0.1 (DNS rebinding).
        cors_origins: of the web pages that may read the answers, like ``https://app.example``.
        max_batch, patience, queue, time_slice: of ``cascade.engine.batcher.Batcher``.
    """

    api_keys: Path | None = None
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_batch: int = 32
    patience: float = 0.05
    queue: int = 256
    time_slice: float = 0.05

    def __post_init__(self) -> None:
        if self.api_keys is None and not self.no_auth and not is_loopback(self.host):
            raise SettingsError(
                f"{self.host} is open to others: add --api-keys FILE, or --no-auth to give everyone access"
            )
        if self.api_keys is not None and self.no_auth:
            raise SettingsError("--api-keys and --no-auth contradict each other: omit one of them")
        check_origins(self.cors_origins)

    @property
    def hosts(self) -> frozenset[str] | None:
        """The names under which requests are accepted; None for any."""
        if self.allowed_hosts or (is_loopback(self.host) and self.api_keys is None):
            return frozenset({"localhost", "127.0.0.1", "::1", self.host.lower(), *map(str.lower, self.allowed_hosts)})
        return None


@dataclass(frozen=True, kw_only=True)
class AsgiSettings(BatchingSettings):
    """Settings of the ASGI front end.

    Attributes:
        grpc_port: port for gRPC in addition to HTTP; None for no gRPC.
        index: a folder made by ``cascade index build``, for /v1/search.
        tls_cert, tls_key: PEM files of the certificate chain and its key; both, or neither for plain HTTP.
        connections: most at the same time; more get 503.
        startup_timeout: seconds until the engine is ready.
        keep_alive: seconds that an idle connection stays open; should exceed that of a load balancer in front.
    """

    grpc_port: int | None = None
    index: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    connections: int = 4096
    startup_timeout: float = 300
    keep_alive: float = 75

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.tls_cert is None) != (self.tls_key is None):
            raise SettingsError("TLS needs both --tls-cert and --tls-key")


@dataclass(frozen=True, kw_only=True)
class RaySettings(BatchingSettings):
    """Settings of Ray Serve. ``workers``: most replicas."""

    workers: int = 1


@dataclass(frozen=True, kw_only=True)
class TorchServeSettings(Settings):
    """Settings of TorchServe, where predictions need a token unless ``no_auth``.

    Attributes:
        workers: processes with a backbone each.
        startup_timeout: seconds until the workers are ready.
        token_file: where the token for predictions is written; None for a private folder.
    """

    log_level: str = "warning"
    workers: int = 1
    startup_timeout: float = 300
    metrics_port: int = 8082
    management_port: int = 8081
    token_file: Path | None = None


def check_origins(origins: Iterable[str]) -> None:
    """Check the origins of web pages. Raises SettingsError."""
    for origin in origins:
        if not ORIGIN.fullmatch(origin):
            raise SettingsError(f"{origin!r} is no origin of a web page: write it like https://app.example")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
