"""What a front end puts on the span of a request."""

from collections.abc import Mapping
from typing import Any

from cascade import tracing

OURS = ("bundle", "version", "images", "tenant", "error", "request_id")


def describe(span: Any, route: str, fields: Mapping[str, Any]) -> None:
    """Put on a span what the log says of its request: method, path, status, and ours."""
    span.update_name(f"{fields['method']} {route}")
    span.set_attributes({"http.request.method": fields["method"], "http.route": route, "url.path": fields["path"]})
    span.set_attribute("http.response.status_code", fields["status"])
    if fields["status"] >= 500 or not fields["status"]:
        tracing.fail(span)
    span.set_attributes({f"cascade.{name}": fields[name] for name in OURS if name in fields})
