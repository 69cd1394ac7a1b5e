"""Traces of server processes, by OTLP over HTTP. Those of Ray are in test_ray_serve.py."""

import signal
from pathlib import Path

import pytest
from PIL import Image

from cascade.bundle.format import write
from tests.helpers.asgi_server import serving_asgi
from tests.helpers.bundles import handmade
from tests.helpers.http import answer, post
from tests.helpers.otlp import CALLER, TRACEPARENT, Collector, receiving
from tests.helpers.torchserve_server import TorchServe
from tests.helpers.torments import settled, until

pytestmark = pytest.mark.e2e


def test_a_collector_gets_the_spans_also_the_last_ones(cifar: list[Image.Image], tmp_path: Path) -> None:
    write(handmade(cifar[:20], size=32), tmp_path / "store" / "birds" / "1")
    cifar[0].save(file := tmp_path / "one.png")
    with receiving() as collector:
        environment = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint,
            "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test",
        }
        with serving_asgi(tmp_path / "store", env=environment) as server:
            until(server.answers)
            response = post(server, file.read_bytes(), traceparent=TRACEPARENT)
            assert answer(response)["bundle"] == "birds"
            server.end(signal.SIGTERM)  # sooner than spans are exported by themselves
    attributes = collector.resource()
    assert attributes["service.name"] == "cascade" and attributes["deployment.environment.name"] == "test"
    spans = collector.spans()
    assert spans.keys() == {"POST /v1/predict", "decode", "queue", "pass", "swap"}
    assert spans["POST /v1/predict"].parent_span_id.hex() == CALLER
    assert spans["pass"].parent_span_id == spans["POST /v1/predict"].span_id


def test_torchserve(server: TorchServe, collector: Collector, photos: list[bytes]) -> None:
    assert answer(post(server, photos[0], X_Cascade_Bundle="one", traceparent=TRACEPARENT))["bundle"] == "one"
    assert settled(lambda: "POST /predictions/cascade" in collector.spans(), 30)
    spans = collector.spans()
    assert spans.keys() == {"POST /predictions/cascade", "decode", "pass", "swap"}
    assert spans["POST /predictions/cascade"].parent_span_id.hex() == CALLER
    assert spans["pass"].parent_span_id == spans["POST /predictions/cascade"].span_id
    assert spans["swap"].parent_span_id == spans["pass"].span_id
