"""Commands and programs on the documentation's pages, as they are typed: only addresses and bundles are ours.

Others are run elsewhere: the first model (test_first_model.py), deployment (tests/test_deploy.py), the demo and make.
Of the commands of training, the quick ones are run; tests/test_docs.py checks the options of all.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

import cascade
from cascade.bundle.format import read
from cascade.cli.main import app
from tests.helpers.asgi_server import Asgi, serving_asgi
from tests.helpers.paths import DATA, ROOT
from tests.helpers.torchserve_server import TorchServe
from training import heads
from training.cli import start

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


SHORT = " --size 32 --steps 4 --expert-steps 4 --batch 32 --clusters 2 --local-crops 0 --dim 32"
"""Options of the page, and of two values the last one counts: trainings of seconds on a few small images."""


def train(command: str) -> None:
    """A command of cascade, or of a stage of training, in this process."""
    program, *words = shlex.split(command)
    if program == "cascade":
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, (command, done.output)
        return
    with pytest.raises(SystemExit) as end:
        start(import_module(words[1]).command, words[2:])
    assert end.value.code == 0, command


@pytest.fixture
def photo_folder(cifar_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``photos/`` and ``new_photos/`` in the current folder."""
    monkeypatch.setattr(heads, "PENALTIES", (1.0,))  # to choose one takes most of the time
    monkeypatch.chdir(tmp_path)
    shutil.copytree(cifar_folder, "photos")
    for name, known in (("car", "automobile"), ("boat", "ship")):
        shutil.copytree(cifar_folder / "test" / known, Path("new_photos", name))


def test_classes_come_and_go(photo_folder: None) -> None:
    (trained,) = (command for command in typed("training.md", "cascade train") if "--extensible" in command)
    added, removed = typed("training.md", "cascade heads")
    for command in (f"{trained}{SHORT} --clusters 0", added, removed):
        train(command)
    kept = {"car", "boat", "airplane", "automobile", "bird", "deer", "frog", "horse", "ship", "truck"}
    assert {*read(Path("model_store/photos/3")).card.classes} == kept


def test_a_cascade_stage_by_stage_gets_pictures_and_a_map(photo_folder: None) -> None:
    section = page("training.md").partition("### Stage by stage")[2].partition("\n### ")[0]
    dispatcher, *others = re.findall(r"^    (python .+)$", section, re.MULTILINE)
    assert len(others) == 4
    for command in (dispatcher + SHORT, *others, *typed("training.md", r"python -m training.thumbnails|cascade map")):
        train(command)
    bundle = read(Path("model_store/photos/3"))
    assert bundle.thumbnails and bundle.map is not None and len(bundle.experts) == 2
    assert "clusters" in bundle.card.accuracy["reliability"]
