"""A real Prometheus scrapes a really served cascade, and answers every query of the dashboard."""

import json
import math
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from handlers.torchserve.entrypoint import LOOPBACK, claim_ports
from tests.conftest import need
from tests.helpers.asgi_server import Asgi
from tests.helpers.deploy import PROMETHEUS, dashboard, expressions
from tests.helpers.http import post
from tests.helpers.paths import ROOT
from tests.helpers.servers import CLIENT, Running
from tests.helpers.torments import settled

pytestmark = pytest.mark.e2e
OF_OPTIONS = ("_tenant_", "_cold_loads_", "_deferred_", "_dispatched_", "_dispatch_confidence_", "_unknown_kept_")
"""Metrics of servers with keys or other options, of bundles with two sizes, and of images without a bundle's name."""


@pytest.fixture(scope="module")
def prometheus(server: Running, asgi: Asgi, photos: list[bytes]) -> Iterator[str]:
    """Our configuration, at both front ends and twice a second, while there is traffic; its address."""
    binary = shutil.which("prometheus")
    need(binary, "prometheus is missing: apt-get install prometheus")
    assert binary
    (port,) = claim_ports((LOOPBACK, 0))
    with tempfile.TemporaryDirectory() as folder:
        config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
        (job,) = config["scrape_configs"]
        (target,) = job["static_configs"]
        job["authorization"] = {"credentials_file": str(server.folder / "token")}  # the ASGI server here needs none
        both = (server, asgi)
        target["targets"] = [each.metrics_url.removeprefix("http://").removesuffix("/metrics") for each in both]
        config["global"] = {"scrape_interval": "500ms", "scrape_timeout": "400ms", "evaluation_interval": "500ms"}
        config["rule_files"] = [str(PROMETHEUS / "alerts.yml")]
        Path(folder, "prometheus.yml").write_text(yaml.safe_dump(config))
        command = [binary, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
        with Path(folder, "log").open("wb") as log:
            process = subprocess.Popen([*command, f"--web.listen-address={LOOPBACK}:{port}"], stderr=log, stdout=log)
        url = f"http://{LOOPBACK}:{port}"
        try:
            end = time.monotonic() + 180
            while len(ask(url, "count_over_time(cascade_backbones[20s]) >= 6")) < len(both):
                assert process.poll() is None and time.monotonic() < end, Path(folder, "log").read_text()
                for each in both:
                    for photo in photos[:4]:
                        post(each, photo, X_Cascade_Bundle="one")
                    post(each, b"no image", X_Cascade_Bundle="one")
                time.sleep(0.3)
            yield url
        finally:
            process.terminate()
            process.wait(60)


def ask(url: str, query: str) -> list[dict[str, Any]]:
    try:
        answer = CLIENT.get(f"{url}/api/v1/query", params={"query": query}).json()
    except httpx.TransportError:  # not up yet
        return []
    assert answer["status"] == "success", answer
    return list(answer["data"]["result"])


def test_every_query_of_the_dashboard_has_an_answer(prometheus: str) -> None:
    names = [v["query"]["query"] for v in dashboard()["templating"]["list"] if v["type"] == "query"]
    assert [name.split("(")[0] for name in names] == ["label_values"] * 2
    assert len(expressions()) > 20
    for query in expressions():
        filled = query.replace("$__rate_interval", "20s").replace("$instance", ".*").replace("$bundle", ".*")
        assert "$" not in filled
        found = ask(prometheus, filled)
        if any(name in query for name in OF_OPTIONS):  # Prometheus has understood the query
            continue
        values = [float(each["value"][1]) for each in found]
        # A bundle without a request in those seconds has no share of anything: NaN, a gap in the picture.
        assert any(math.isfinite(v) for v in values), f"{query}: {json.dumps(found)}"


def test_rules_are_loaded_and_a_broken_bundle_is_pending(prometheus: str) -> None:
    def rules() -> dict[str, tuple[str, str]]:
        (group,) = CLIENT.get(f"{prometheus}/api/v1/rules").json()["data"]["groups"]
        return {rule["name"]: (rule["health"], rule["state"]) for rule in group["rules"]}

    quiet = {"CascadeDown", "CascadeNothingServed", "CascadeFailing", "CascadeStoreUnreachable"}
    settled(lambda: {rules()[name] for name in quiet} == {("ok", "inactive")}, 60)  # a scrape may have come late
    states = rules()
    assert {health for health, _ in states.values()} == {"ok"}
    assert states["CascadeBundleRefused"] == ("ok", "pending"), "the session's store holds a broken bundle"
    assert {states[name] for name in quiet} == {("ok", "inactive")}
    assert all(f"`{name}`" in (ROOT / "docs" / "observability.md").read_text() for name in states)
