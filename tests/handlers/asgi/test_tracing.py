"""Spans of requests over HTTP and gRPC, by OpenTelemetry's own exporter in memory."""

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from PIL import Image
from tritonclient import grpc as triton

from cascade import Engine, tracing
from cascade.bundle.format import write
from cascade.engine.batcher import Batcher
from cascade.engine.stores import load_store
from handlers.asgi.app import create_app
from handlers.asgi.middleware import Guard
from handlers.asgi.service import Service
from tests.helpers.asgi_app import LIMITS, binary, client
from tests.helpers.bundles import handmade
from tests.helpers.grpc_app import serving

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = {"traceparent": f"00-{TRACE}-{CALLER}-01"}


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    provider, exporter = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing.use(provider)
    try:
        yield exporter
    finally:
        tracing.use(None)


@pytest.fixture
def guard(cifar: list[Image.Image], tmp_path: Path) -> Iterator[Guard]:
    first = write(handmade(cifar[:20], size=32), tmp_path / "store" / "birds" / "1")
    shutil.copytree(first, tmp_path / "store" / "ships" / "1")
    registry = load_store(Engine(), tmp_path / "store", cache=tmp_path / "cache", on_demand=True)
    with Batcher(registry.engine) as batcher:
        yield create_app(Service(batcher, limits=LIMITS, registry=registry))


def tree(spans: InMemorySpanExporter) -> dict[str, list[ReadableSpan]]:
    """Spans by name; all are of one trace, and a child is inside its parent."""
    found = spans.get_finished_spans()
    by_id = {span.context.span_id: span for span in found if span.context}
    named: dict[str, list[ReadableSpan]] = {}
    for span in found:
        named.setdefault(span.name, []).append(span)
        assert span.context and f"{span.context.trace_id:032x}" == TRACE
        parent = by_id.get(span.parent.span_id) if span.parent else None
        if parent is not None:
            assert parent.start_time and span.start_time and parent.end_time and span.end_time
            slack = 10**7  # two clocks
            assert parent.start_time - slack <= span.start_time <= span.end_time <= parent.end_time + slack
    spans.clear()
    return named


def parent(span: ReadableSpan) -> int:
    assert span.parent is not None
    return span.parent.span_id


def test_a_request_from_its_head_to_its_swaps(guard: Guard, spans: InMemorySpanExporter, files: list[bytes]) -> None:
    ask = client(guard)
    answer = ask("POST", "/v1/predict", content=files[0], headers=PARENT | {"X-Cascade-Bundle": "birds"})
    found = tree(spans)
    (request,) = found.pop("POST /v1/predict")
    assert parent(request) == int(CALLER, 16) and request.attributes is not None
    assert request.attributes["cascade.bundle"] == "birds" and request.attributes["http.response.status_code"] == 200
    assert request.attributes["cascade.request_id"] == answer.headers["x-request-id"]
    assert set(found) == {"load", "decode", "queue", "pass", "swap"}
    assert request.context and {parent(s) for name in found if name != "swap" for s in found[name]} == {
        request.context.span_id
    }
    (whole,) = found["pass"]
    assert dict(whole.attributes or {}) == {
        "cascade.bundle": "birds",
        "cascade.version": "1",
        "cascade.images": 1,
        "cascade.batch_images": 1,
        "cascade.cold_load": True,
    }
    assert whole.context and {parent(swap) for swap in found["swap"]} == {whole.context.span_id}
    several = binary(files[:3])
    ask("POST", "/v2/models/birds/infer", **several | {"headers": several["headers"] | PARENT})
    found = tree(spans)
    assert len(found["decode"]) == len(found["queue"]) == 3 and "load" not in found
    passes = [dict(each.attributes or {}) for each in found["pass"]]
    assert sum(int(str(each["cascade.images"])) for each in passes) == 3
    assert not any(each["cascade.cold_load"] for each in passes)


def test_a_bundle_that_is_loaded_before_the_body(guard: Guard, spans: InMemorySpanExporter, files: list[bytes]) -> None:
    options = binary(files[:1])
    client(guard)("POST", "/v2/models/ships/infer", **options | {"headers": options["headers"] | PARENT})
    found = tree(spans)
    assert len(found["load"]) == 1 and (found["pass"][0].attributes or {})["cascade.cold_load"] is True


def test_errors_and_polls(
    guard: Guard, spans: InMemorySpanExporter, files: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = client(guard)
    ask("POST", "/v1/predict", content=b"no image", headers=PARENT | {"X-Cascade-Bundle": "birds"})
    (request,) = tree(spans)["POST /v1/predict"]
    assert (request.attributes or {})["cascade.error"] == "not_an_image" and request.status.status_code.name == "UNSET"
    for path in ("/v2/health/ready", "/metrics"):
        ask("GET", path, headers=PARENT)
    assert not spans.get_finished_spans()

    async def broken(*_: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(Service, "answers", broken)
    assert ask("POST", "/v1/predict", content=files[0], headers=PARENT | {"X-Cascade-Bundle": "birds"}).is_server_error
    assert tree(spans)["POST /v1/predict"][0].status.status_code is StatusCode.ERROR


def test_the_parent_of_a_grpc_call(guard: Guard, spans: InMemorySpanExporter, files: list[bytes]) -> None:
    image = triton.InferInput("image", [1], "BYTES")
    image.set_data_from_numpy(np.array([files[0]], np.object_))
    with serving(guard) as address, triton.InferenceServerClient(address) as caller:
        caller.infer("birds", [image], headers=PARENT)
    found = tree(spans)
    (request,) = found["POST /v2/models/{model}/infer"]
    assert parent(request) == int(CALLER, 16) and {"decode", "queue", "pass", "swap"} <= set(found)


def test_requests_of_one_pass_have_their_own_traces(
    guard: Guard, spans: InMemorySpanExporter, files: list[bytes]
) -> None:
    """Requests that arrive together, as from several callers."""
    ask = client(guard)
    ask("POST", "/v1/predict", content=files[0], headers={"X-Cascade-Bundle": "birds"})
    spans.clear()

    async def both() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(guard), base_url="http://test") as http:
            headers = [PARENT, {"traceparent": f"00-{TRACE[::-1]}-{CALLER}-01"}]
            asks = [
                http.post("/v1/predict", content=files[0], headers=h | {"X-Cascade-Bundle": "birds"}) for h in headers
            ]
            await asyncio.gather(*asks)

    asyncio.run(both())
    passes = [s for s in spans.get_finished_spans() if s.name == "pass"]
    assert {f"{s.context.trace_id:032x}" for s in passes if s.context} == {TRACE, TRACE[::-1]}
