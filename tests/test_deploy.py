"""What lies in deploy/: valid by the tools' own checks, and about metrics that there are."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import handlers.asgi.metrics  # noqa: F401  adds its metrics to the registry
from cascade import metrics
from tests.conftest import need

DEPLOY = Path(__file__).parents[1] / "deploy"
PROMETHEUS = DEPLOY / "prometheus"
DOCS = Path(__file__).parents[1] / "docs" / "observability.md"


def dashboard() -> dict[str, Any]:
    return dict(json.loads((DEPLOY / "grafana" / "cascade.json").read_text()))


def expressions() -> list[str]:
    return [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", [])]


def known() -> set[str]:
    """Every sample name that our metrics can have."""
    suffixes = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}
    families = [f for f in metrics.REGISTRY.collect() if f.name.startswith("cascade_")]
    return {f.name + suffix for f in families for suffix in suffixes[f.type]}


def named(text: str) -> set[str]:
    return set(re.findall(r"\bcascade_\w+", text))


def test_promtool_finds_nothing_and_every_alert_fires_as_it_should() -> None:
    promtool = shutil.which("promtool")
    need(promtool, "promtool is missing: apt-get install prometheus")
    assert promtool
    for arguments in (["check", "config", "prometheus.yml"], ["test", "rules", "alerts_test.yml"]):
        done = subprocess.run([promtool, *arguments], cwd=PROMETHEUS, capture_output=True, text=True)
        assert done.returncode == 0 and "SUCCESS" in done.stdout, done.stdout + done.stderr


def test_every_alert_is_tested() -> None:
    alerts = set(re.findall(r"alert: (\w+)", (PROMETHEUS / "alerts.yml").read_text()))
    assert alerts and alerts <= set(re.findall(r"\bCascade\w+", (PROMETHEUS / "alerts_test.yml").read_text()))


def test_only_metrics_that_there_are() -> None:
    for text in ((PROMETHEUS / "alerts.yml").read_text(), "\n".join(expressions())):
        assert named(text) and named(text) <= known(), named(text) - known()


def test_panels_have_their_own_place_and_number() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for p in (panel["gridPos"] for panel in panels)
        for x in range(p["x"], p["x"] + p["w"])
        for y in range(p["y"], p["y"] + p["h"])
    ]
    assert len(set(cells)) == len(cells) and max(x for x, _ in cells) == 23


def test_every_metric_is_documented() -> None:
    families = {f.name + ("_total" if f.type == "counter" else "") for f in metrics.REGISTRY.collect()}
    assert {name for name in families if name.startswith("cascade_")} <= named(DOCS.read_text())
