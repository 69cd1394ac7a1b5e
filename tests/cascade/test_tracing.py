"""Traces are off unless the environment asks for them, and then cost nothing."""

import os
import subprocess
import sys

import pytest

from cascade import tracing
from cascade.errors import CascadeError
from cascade.extras import ExtraError
from cascade.tracing import Part, Trace
from tests.helpers.paths import ROOT

ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}


@pytest.mark.parametrize(
    "environment",
    [{}, ENDPOINT | {"OTEL_SDK_DISABLED": "true"}, ENDPOINT | {"OTEL_TRACES_EXPORTER": "none"}],
)
def test_off(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert not tracing.start() and tracing.begin(cold=True) is None
    with tracing.request("GET", {}) as request, tracing.loading("birds"), tracing.span("decode", None) as decode:
        assert request is decode is None
    with tracing.parts() as parts, tracing.part("swap"):
        pass
    assert parts == [] and tracing.record(Part("queue", 0, 1), Trace(None)) is None
    tracing.stop()


def test_other_exporters_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(*next(iter(ENDPOINT.items())))
    for name, value in (("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"), ("OTEL_TRACES_EXPORTER", "zipkin")):
        monkeypatch.setenv(name, value)
        with pytest.raises(CascadeError, match="by OTLP over HTTP only: set OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf"):
            tracing.start()
        monkeypatch.delenv(name)


def test_without_the_library_one_line_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(*next(iter(ENDPOINT.items())))
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ExtraError, match=r"opentelemetry is not installed: pip install 'cascade-vision\[otel\]'"):
        tracing.start()


@pytest.mark.slow
def test_the_engine_does_not_import_opentelemetry() -> None:
    code = "import sys, cascade.engine.batcher\nsys.exit(any(m.startswith('opentelemetry') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode == 0
