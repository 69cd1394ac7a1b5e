"""What is in deploy/ for Prometheus and Grafana."""

import json
from typing import Any

from tests.helpers.paths import ROOT

DEPLOY = ROOT / "deploy"
PROMETHEUS = DEPLOY / "prometheus"


def dashboard() -> dict[str, Any]:
    """Grafana's."""
    return dict(json.loads((DEPLOY / "grafana" / "cascade.json").read_text()))


def expressions() -> list[str]:
    """Every query of the dashboard."""
    return [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", [])]
