"""The files in deploy/: valid by the tools' own checks, and about options and metrics that exist."""

import re
import shutil
import subprocess
from typing import Any

import typer
import yaml
from prometheus_client import REGISTRY, Metric
from typer.testing import CliRunner

import cascade.engine.tenant_metrics  # noqa: F401  adds its metrics to the registry
import handlers.asgi.metrics  # noqa: F401  the same
from cascade.cli import main
from tests.conftest import need
from tests.helpers.deploy import DEPLOY, PROMETHEUS, dashboard, expressions
from tests.helpers.paths import ROOT

DEPLOYMENT = ROOT / "docs" / "deployment.md"
DOCS = ROOT / "docs" / "observability.md"


def samples(family: Metric) -> set[str]:
    """Every sample name that a metric can have."""
    suffixes = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}
    return {family.name + suffix for suffix in suffixes[family.type]}


def known() -> set[str]:
    return {name for f in REGISTRY.collect() if f.name.startswith("cascade_") for name in samples(f)}


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


def test_every_metric_is_on_the_dashboard() -> None:
    shown = named((DEPLOY / "grafana" / "cascade.json").read_text())
    hidden = [f.name for f in REGISTRY.collect() if f.name.startswith("cascade_") and not samples(f) & shown]
    assert hidden == []


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
    families = {f.name + ("_total" if f.type == "counter" else "") for f in REGISTRY.collect()}
    assert {name for name in families if name.startswith("cascade_")} <= named(DOCS.read_text())


def options() -> set[str]:
    """The environment variable of each option of `cascade serve`."""
    command: Any = typer.main.get_command(main.app)
    return {f"CASCADE_SERVE_{parameter.name.upper()}" for parameter in command.commands["serve"].params}


def configuration() -> dict[str, str]:
    text = (DEPLOY / "cascade.env").read_text()
    return dict(re.findall(r"^(?:# )?(CASCADE_SERVE_\w+)=(\S+)$", text, re.MULTILINE))


def test_the_configuration_file_names_options_of_serve() -> None:
    assert len(configuration()) > 4 and configuration().keys() <= options()
    assert set(re.findall(r"CASCADE_SERVE_[A-Z_]*[A-Z]", DEPLOYMENT.read_text())) <= options() | {"CASCADE_SERVE_"}


def test_options_come_from_the_environment() -> None:
    done = CliRunner().invoke(main.app, ["serve"], env={"CASCADE_SERVE_PORT": "none"})
    assert done.exit_code == 2 and "--port" in done.output


def test_the_address_of_a_service_is_no_port() -> None:
    """Kubernetes sets this variable in every pod beside a Service called cascade-serve."""
    environment = {"CASCADE_SERVE_PORT": "tcp://10.96.0.7:80", "COLUMNS": "300", "TERM": "dumb"}
    done = CliRunner().invoke(main.app, ["serve"], env=environment)
    assert done.exit_code == 2 and "set enableServiceLinks: false" in done.output


def test_compose_is_closed_and_starts_the_server() -> None:
    compose = yaml.safe_load((DEPLOY / "docker" / "compose.yaml").read_text())
    for service in compose["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]
        assert set(service["secrets"]) <= compose["secrets"].keys()
    server = compose["services"]["cascade"]
    assert server["read_only"] and f"/run/secrets/{server['secrets'][0]}" in server["command"]
    assert (DEPLOY / "docker" / server["env_file"]).resolve() == DEPLOY / "cascade.env"
    assert (DEPLOY / "docker" / server["build"] / "Dockerfile").exists()
    grace, drain = int(server["stop_grace_period"][:-1]), int(configuration()["CASCADE_SERVE_DRAIN_TIMEOUT"])
    assert grace > drain
    config = yaml.safe_load(compose["configs"]["prometheus"]["content"])
    assert config["scrape_configs"][0]["authorization"]["credentials_file"] == "/run/secrets/metrics-key"


def test_the_systemd_unit_has_few_rights() -> None:
    unit = dict(
        line.split("=", 1)
        for line in (DEPLOY / "systemd" / "cascade.service").read_text().splitlines()
        if "=" in line and not line.startswith("#")
    )
    assert unit["DynamicUser"] == unit["NoNewPrivileges"] == "yes" and unit["ProtectSystem"] == "strict"
    assert unit["CapabilityBoundingSet"] == "" and "--api-keys" in unit["ExecStart"]
    assert int(unit["TimeoutStopSec"]) > int(configuration()["CASCADE_SERVE_DRAIN_TIMEOUT"])
    if analyze := shutil.which("systemd-analyze"):
        done = subprocess.run(
            [analyze, "verify", DEPLOY / "systemd" / "cascade.service"], capture_output=True, text=True
        )
        problems = [line for line in done.stderr.splitlines() if "is not executable" not in line]
        assert not [line for line in problems if "cascade.service" in line], done.stderr
