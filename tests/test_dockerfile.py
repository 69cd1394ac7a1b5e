"""The Dockerfile: clean by hadolint, the same commands as make, and a health check that tells ready from alive."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

ROOT = Path(__file__).parents[1]


def instructions(keyword: str) -> list[str]:
    """The arguments of every such instruction, continued lines joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    return re.findall(rf"^{keyword} (.*)$", text.replace("\\\n", ""), flags=re.MULTILINE)


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_runs_what_make_runs(device: str) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    command = ["make", "--dry-run", "--always-make", "system", "env", f"DEVICE={device}", "PYTHON=python3"]
    recipes = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    lines = recipes.stdout.replace("\\\n", "").splitlines()
    made = {step.split(" | ")[0] for line in lines for step in line.split(" && ")}

    runs = [re.sub(r"^--mount=\S+ ", "", line).replace("${DEVICE}", device) for line in instructions("RUN")]
    steps = [shlex.join(shlex.split(step)) for line in runs for step in line.split(" && ")]
    assert len(steps) == 5
    assert set(steps) <= made


class Management(BaseHTTPRequestHandler):
    """Says what TorchServe's management address says of a model whose worker has the state in the class."""

    status = "READY"
    wanted: str | None = None

    def do_GET(self) -> None:
        body = json.dumps([{"modelName": "cascade", "workers": [{"id": "9000", "status": self.status}]}]).encode()
        allowed = self.headers["Authorization"] == self.wanted
        self.send_response(400 if not allowed else 200 if self.path == "/models/cascade" else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def management() -> Iterator[HTTPServer]:
    with HTTPServer(("127.0.0.1", 0), Management) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("auth", [True, False])
def test_health_is_the_readiness_of_the_worker(
    management: HTTPServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, auth: bool
) -> None:
    (check,) = instructions("HEALTHCHECK")
    python, *arguments = json.loads(check.partition("CMD ")[2])
    assert python == "python"
    if auth:
        monkeypatch.setattr(Management, "wanted", "Bearer the-key")
        (tmp_path / "cascade-xyz").mkdir()
        (tmp_path / "cascade-xyz/key_file.json").write_text(json.dumps({"management": {"key": "the-key"}}))

    def is_healthy() -> bool:
        program = arguments[1].replace(":8081/", f":{management.server_port}/").replace("/tmp/", f"{tmp_path}/")
        return subprocess.run([sys.executable, arguments[0], program], capture_output=True).returncode == 0

    assert is_healthy()
    monkeypatch.setattr(Management, "status", "WORKER_STOPPED")
    assert not is_healthy()
