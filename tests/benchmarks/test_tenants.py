"""The benchmark of tenants on a small network: that it measures what it says; its figures mean nothing here."""

import json
from pathlib import Path

import pytest

from benchmarks import tenants


def test_jain() -> None:
    assert tenants.jain([7, 7, 7]) == 1
    assert tenants.jain([9, 0, 0]) == pytest.approx(1 / 3)


@pytest.mark.slow
def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tenants, "exit_on_signals", lambda status: None)  # it would stay for the tests after this one
    out = tmp_path / "tenants.json"
    tenants.main("test_resnet", tenants=3, rounds=1, seconds=1.5, out=out)
    figures = json.loads(out.read_text())["figures"]
    assert figures["victim_refused"]["value"] == 0, "the quiet tenant is never refused"
    assert figures["images_per_second"]["value"] > 0 and 1 / 3 <= figures["jain"]["value"] <= 1
    assert {"victim_p99", "fair_throughput"} <= figures.keys()
    assert "beside a flood" in capsys.readouterr().out
