"""Traces of a server process, by OTLP over HTTP to a receiver that parses them as a collector does.

The receiver stands for the OpenTelemetry Collector, whose binary is in no package registry that the tests use.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from PIL import Image

from cascade.bundle.format import write
from tests.helpers.asgi_server import serving_asgi
from tests.helpers.bundles import handmade
from tests.helpers.http import answer, post
from tests.helpers.torments import until

pytestmark = pytest.mark.e2e
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@contextmanager
def receiving() -> Iterator[tuple[str, list[ExportTraceServiceRequest]]]:
    """Receive exports until the block ends; yields the endpoint and what came."""
    came: list[ExportTraceServiceRequest] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces" and self.headers["Content-Type"] == "application/x-protobuf"
            came.append(ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"]))))
            body = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", came
        server.shutdown()


def test_a_collector_gets_the_spans_also_the_last_ones(cifar: list[Image.Image], tmp_path: Path) -> None:
    write(handmade(cifar[:20], size=32), tmp_path / "store" / "birds" / "1")
    cifar[0].save(file := tmp_path / "one.png")
    with receiving() as (endpoint, came):
        environment = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
            "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test",
        }
        with serving_asgi(tmp_path / "store", env=environment) as server:
            until(server.answers)
            response = post(server, file.read_bytes(), traceparent=f"00-{TRACE}-{CALLER}-01")
            assert answer(response)["bundle"] == "birds"
            server.end(signal.SIGTERM)  # sooner than spans are exported by themselves
    resources = [resource for request in came for resource in request.resource_spans]
    attributes = {each.key: each.value.string_value for each in resources[0].resource.attributes}
    assert attributes["service.name"] == "cascade" and attributes["deployment.environment.name"] == "test"
    spans = [span for resource in resources for scope in resource.scope_spans for span in scope.spans]
    ours = [span for span in spans if span.trace_id.hex() == TRACE]
    assert {span.name for span in ours} == {"POST /v1/predict", "decode", "queue", "pass", "swap"}
    (request,) = [span for span in ours if span.name == "POST /v1/predict"]
    assert request.parent_span_id.hex() == CALLER
    (whole,) = [span for span in ours if span.name == "pass"]
    assert whole.parent_span_id == request.span_id
