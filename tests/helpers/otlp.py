"""A receiver of traces by OTLP over HTTP, which parses them as a collector does.

It stands for the OpenTelemetry Collector, whose binary is in no package registry that the tests use.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{CALLER}-01"


@dataclass
class Collector:
    """What came to ``endpoint`` so far."""

    endpoint: str = ""
    came: list[ExportTraceServiceRequest] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """Variables of a server that sends its spans here, twice a second."""
        return {"OTEL_EXPORTER_OTLP_ENDPOINT": self.endpoint, "OTEL_BSP_SCHEDULE_DELAY": "500"}

    def resource(self) -> dict[str, str]:
        """The attributes of the first resource."""
        return {each.key: each.value.string_value for each in self.came[0].resource_spans[0].resource.attributes}

    def spans(self, trace: str = TRACE) -> dict[str, Span]:
        """The spans of a trace by name; of several with one name, the last."""
        scopes = [scope for request in self.came for r in request.resource_spans for scope in r.scope_spans]
        return {span.name: span for scope in scopes for span in scope.spans if span.trace_id.hex() == trace}


@contextmanager
def receiving() -> Iterator[Collector]:
    """Receive exports until the block ends."""
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces" and self.headers["Content-Type"] == "application/x-protobuf"
            content = self.rfile.read(int(self.headers["Content-Length"]))
            collector.came.append(ExportTraceServiceRequest.FromString(content))
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
        collector.endpoint = f"http://127.0.0.1:{server.server_port}"
        yield collector
        server.shutdown()
