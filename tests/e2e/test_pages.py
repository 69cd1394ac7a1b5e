"""Commands and programs on the documentation's pages, as they are typed: only addresses and bundles are ours.

Others are run elsewhere: the first model (test_first_model.py), deployment (tests/test_deploy.py), the demo and make.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

import cascade
from cascade.cli.main import app
from tests.helpers.asgi_server import Asgi, serving_asgi
from tests.helpers.paths import DATA, ROOT
from tests.helpers.torchserve_server import TorchServe

pytestmark = pytest.mark.e2e

ADDRESS = "127.0.0.1:8080"


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text().replace("\\\n", " ")


def typed(name: str, start: str) -> list[str]:
    """The lines of a page's code that begin with a pattern, without comments."""
    lines = re.findall(r"^(?:    |\$ )(\S.*)$", page(name), re.MULTILINE)
    return [re.sub(r"\s+# .*", "", line) for line in lines if re.match(start, line)]


def here(code: str, url: str) -> str:
    """A command or a program for the server at ``url``, whose bundle is ``one``."""
    address = httpx.URL(url)
    return code.replace(ADDRESS, f"{address.host}:{address.port}").replace("paper", "one")


def shell(command: str, folder: Path, **variables: str) -> str:
    """What the command prints; curl fails where the server answers with an error."""
    command = re.sub(r"\bcurl ", "curl --silent --noproxy '*' --fail-with-body ", command)
    variables["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euc", command], cwd=folder, env=os.environ | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the images that the pages name."""
    folder = tmp_path_factory.mktemp("typed")
    for name, photo in (("cat.jpg", "cat-0000"), ("cat.png", "cat-0000"), ("ship.png", "ship-0001")):
        shutil.copy(DATA / "photos" / f"{photo}.png", folder / name)
    return folder


@pytest.mark.parametrize(("name", "number"), [("http.md", 6), ("usage.md", 2)])
def test_curl_and_the_asgi_server(name: str, number: int, asgi: Asgi, folder: Path) -> None:
    commands = [command for command in typed(name, "curl ") if ADDRESS in command and "$key" not in command]
    assert len(commands) >= number
    for command in commands:
        answer = json.loads(shell(here(command, asgi.url), folder))
        assert {answer.get("bundle"), answer.get("model_name")} & {"one", "two"}, command


def test_curl_and_torchserve(server: TorchServe, folder: Path) -> None:
    commands = typed("torchserve.md", "curl -H ")
    assert len(commands) == 4
    for command in commands:
        answer = shell(here(command, server.url), folder, TOKEN=f"Authorization: {server.headers['Authorization']}")
        assert '"error"' not in answer, (command, answer)


@pytest.mark.parametrize(("name", "number"), [("http.md", 2), ("usage.md", 2)])
def test_programs_and_the_asgi_server(
    name: str, number: int, asgi: Asgi, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """With Cascade's client and with Triton's."""
    programs = [code for code in re.findall(r"^```python\n(.*?)^```", page(name), re.M | re.S) if ADDRESS in code]
    assert len(programs) == number
    monkeypatch.chdir(folder)
    for code in programs:
        names: dict[str, object] = {"cascade": cascade}
        exec(here(code, asgi.base), names)
        if "answer" in names:
            assert getattr(names["answer"], "bundle", None) == "one"
            assert isinstance(names["columns"], dict) and not any(names["columns"]["error"])
        else:
            assert capsys.readouterr().out.strip(" []\nb'")


def test_keys_are_made_and_taken(shelf: Path, folder: Path) -> None:
    """One by http.md, for a bundle, and one by deployment.md, for all; a server with both accepts each."""
    asked = []
    for name in ("deployment.md", "http.md"):
        made = [*typed(name, "key="), *typed(name, "echo ")][:2]
        key = shell("; ".join([*(line.replace("paper", "one") for line in made), 'printf %s "$key"']), folder)
        (command,) = (line for line in typed(name, "curl ") if ADDRESS in line and "$key" in line)
        asked.append((key, command))
    assert len((folder / "keys").read_text().splitlines()) == 2
    with serving_asgi(shelf, "--api-keys", str(folder / "keys")) as server:
        for key, command in asked:
            assert '"bundle":"one"' in shell(here(command, server.url), folder, key=key).replace(" ", "")


def test_batch_jobs_and_indexes(
    bundle_path: Path, cifar_folder: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other, then ``cascade serve --index`` is asked as offline.md does."""
    shutil.copytree(bundle_path, tmp_path / "model_store" / "paper" / "1")
    shutil.copytree(cifar_folder / "test", tmp_path / "photos")
    shutil.copytree(DATA / "photos", tmp_path / "new")
    shutil.copy(folder / "cat.jpg", tmp_path)
    rows = [f"{path.relative_to(tmp_path)},{n + 0.5}" for n, path in enumerate(sorted((tmp_path / "new").iterdir()))]
    tmp_path.joinpath("prices.csv").write_text("\n".join(["path,price", *rows, ""]))
    monkeypatch.chdir(tmp_path)
    job, dispatched = typed("offline.md", "cascade predict photos/")
    indexes = [c for c in typed("offline.md", "cascade index") if " photos.index" in c]
    filtered = [c.replace(" idx", " photos.index") for c in typed("offline.md", "cascade index") if "price" in c]
    assert (len(indexes), len(filtered)) == (6, 2)
    for command in [job, *indexes, *filtered, dispatched.replace("predictions", "dispatched")]:
        done = CliRunner().invoke(app, shlex.split(command)[1:])
        assert done.exit_code == 0, (command, done.output)
    served = ("--index", str(tmp_path / "photos.index"))
    with serving_asgi(tmp_path / "model_store", *served) as server:
        for command in typed("offline.md", "curl "):
            answer = shell(command.replace(ADDRESS, "{}:{}".format(*server.address)), tmp_path)
            assert "cat-0000.png" in answer, (command, answer)
