"""Spans of OpenTelemetry, the extra ``otel``. Off, and without cost, unless OTEL_EXPORTER_OTLP_ENDPOINT is set.

A front end opens a request's span with ``request``. ``begin`` takes its context from the event loop to the threads of
the batcher, which open spans with ``span``, or ``record`` them when they are over. OpenTelemetry is imported by
``start`` alone. The provider is our own, not the global one, so no library adds spans by itself.
"""

import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from cascade.errors import CascadeError
from cascade.extras import library

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
HTTP = "http/protobuf"

_provider: Any = None
_tracer: Any = None
_cold: ContextVar[bool] = ContextVar("cascade_cold", default=False)
_local = threading.local()
_nothing: AbstractContextManager[Any] = nullcontext()


@dataclass(frozen=True)
class Trace:
    """Where spans of a request belong. ``cold``: whether its bundle had to be loaded for it."""

    context: Any
    cold: bool = False


@dataclass(frozen=True)
class Part:
    """A part of a pass; times are monotonic seconds."""

    name: str
    start: float
    end: float
    attributes: Mapping[str, Any] = field(default_factory=dict)


def start() -> bool:
    """Export spans, if the environment asks for it; returns whether it does.

    The standard variables apply: OTEL_EXPORTER_OTLP_*, OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER, OTEL_BSP_*,
    OTEL_SDK_DISABLED, OTEL_PROPAGATORS.

    Raises:
        ExtraError: OpenTelemetry is not installed.
        CascadeError: the environment names another protocol than OTLP over HTTP.
    """
    disabled = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    exporter = os.environ.get("OTEL_TRACES_EXPORTER") or "otlp"
    if disabled or exporter == "none" or not any(os.environ.get(name) for name in ENDPOINTS):
        return False
    protocol = next((os.environ[name] for name in PROTOCOLS if os.environ.get(name)), HTTP)
    if exporter != "otlp" or protocol != HTTP:
        raise CascadeError(f"traces are exported by OTLP over HTTP only: set {PROTOCOLS[1]}={HTTP}")
    trace = library("opentelemetry.sdk.trace")
    resources = library("opentelemetry.sdk.resources")
    named = "OTEL_SERVICE_NAME" in os.environ or "service.name" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    provider = trace.TracerProvider(resource=resources.Resource.create({} if named else {"service.name": "cascade"}))
    exporting = library("opentelemetry.exporter.otlp.proto.http.trace_exporter").OTLPSpanExporter()
    provider.add_span_processor(library("opentelemetry.sdk.trace.export").BatchSpanProcessor(exporting))
    use(provider)
    return True


def use(provider: Any) -> None:
    """Send spans to a TracerProvider; None for nowhere."""
    global _provider, _tracer
    _provider, _tracer = provider, None if provider is None else provider.get_tracer("cascade")


def stop() -> None:
    """Export what is left."""
    provider = _provider
    use(None)
    if provider is not None:
        provider.shutdown()


def request(method: str, headers: Mapping[bytes, bytes]) -> AbstractContextManager[Any]:
    """The span of a request, a child of the caller's ``traceparent`` if there is one; None if traces are off."""
    return _nothing if _tracer is None else _request(method, headers)


def fail(span: Any) -> None:
    """Mark a span as failed."""
    span.set_status(library("opentelemetry.trace").StatusCode.ERROR)


def begin(cold: bool) -> Trace | None:
    """The current request, for spans in other threads; None if traces are off. ``cold``: its bundle is loaded now."""
    if _tracer is None:
        return None
    return Trace(library("opentelemetry.context").get_current(), cold or _cold.get())


def loading(bundle: str) -> AbstractContextManager[Any]:
    """The span of a cold load in the current request."""
    if _tracer is None:
        return _nothing
    _cold.set(True)
    span: AbstractContextManager[Any] = _tracer.start_as_current_span("load", attributes={"cascade.bundle": bundle})
    return span


def span(name: str, trace: Trace | None, **attributes: Any) -> AbstractContextManager[Any]:
    """A span around a block of a thread."""
    if _tracer is None or trace is None:
        return _nothing
    opened: AbstractContextManager[Any] = _tracer.start_as_current_span(
        name, context=trace.context, attributes=_named(attributes)
    )
    return opened


def record(part: Part, trace: Trace, within: Any = None) -> Any:
    """Record a span that is over, and return it as the parent (``within``) of others."""
    if _tracer is None:
        return None
    context = trace.context if within is None else library("opentelemetry.trace").set_span_in_context(within)
    now, monotonic = time.time_ns(), time.monotonic()
    start, end = (now - int(1e9 * (monotonic - at)) for at in (part.start, part.end))
    done = _tracer.start_span(part.name, context=context, start_time=start, attributes=_named(part.attributes))
    done.end(end)
    return done


def part(name: str) -> AbstractContextManager[Any]:
    """Note a part of the pass that this thread runs."""
    return _nothing if getattr(_local, "parts", None) is None else _part(name)


@contextmanager
def parts() -> Iterator[list[Part]]:
    """Collect the parts of a pass that this thread runs in the block; none if traces are off."""
    collected: list[Part] = []
    _local.parts = None if _tracer is None else collected
    try:
        yield collected
    finally:
        _local.parts = None


@contextmanager
def _request(method: str, headers: Mapping[bytes, bytes]) -> Iterator[Any]:
    carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers.items()}
    context = library("opentelemetry.propagate").extract(carrier)
    kind = library("opentelemetry.trace").SpanKind.SERVER
    with _tracer.start_as_current_span(method, context=context, kind=kind) as opened:
        yield opened


@contextmanager
def _part(name: str) -> Iterator[None]:
    begun = time.monotonic()
    try:
        yield
    finally:
        _local.parts.append(Part(name, begun, time.monotonic()))


def _named(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {f"cascade.{name}": value for name, value in attributes.items()}
