"""The base install: every command of an extra ends with the line that names it, and the rest works without extras."""

import json
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cascade.extras import EXTRAS, ExtraError, library, missing
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow

BASE = """
import importlib.metadata, sys
sys.modules.update(dict.fromkeys(%r))  # an import of one of them raises ModuleNotFoundError
real = importlib.metadata.distribution
def distribution(name):
    if name == "torchserve":
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)
importlib.metadata.distribution = distribution
"""
COMMANDS = {
    "train": ["train", "photos", "--out", "store/a/1"],
    "torchserve": ["serve", "--frontend", "torchserve"],
    "ray": ["serve", "--frontend", "ray"],
    "offline": ["predict", "photos", "--out", "out"],
    "index": ["index", "build", "out", "--out", "index"],
}
HELP = ("train", "predict", "serve", "evaluate", "index", "inspect")
PROGRAM = """
import json
import cascade, handlers.asgi.worker, handlers.asgi.app
cascade.load, cascade.Engine, cascade.Client
from typer.testing import CliRunner
from cascade.cli.main import app
said = []
for command in json.loads(sys.argv[1]):
    done = CliRunner().invoke(app, command)
    assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
    said.append([done.exit_code, done.stderr])
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said() -> dict[str, tuple[int, str]]:
    """Status and stderr of each command after ``pip install cascade-vision``, without any extra.

    One process imports the runtime and the ASGI server, which need none, and runs all commands.
    """
    # FastAPI needs OpenTelemetry's interface, so the extra adds only what implements it.
    blocked = EXTRAS.keys() - {"torchserve", "opentelemetry"} | {"opentelemetry.sdk", "opentelemetry.exporter"}
    commands = {**COMMANDS, **{f"{name} --help": [name, "--help"] for name in HELP}}
    program = [sys.executable, "-c", BASE % sorted(blocked) + PROGRAM, json.dumps([*commands.values()])]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(zip(commands, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("command", COMMANDS)
def test_command_of_an_extra_names_it(said: dict[str, tuple[int, str]], command: str) -> None:
    status, stderr = said[command]
    (line,) = stderr.splitlines()
    assert status == 1 and line.startswith("error: ")
    assert "is not installed: pip install 'cascade-vision[" in line


@pytest.mark.parametrize("command", HELP)
def test_help_is_no_traceback(said: dict[str, tuple[int, str]], command: str) -> None:
    status, stderr = said[f"{command} --help"]
    assert status == 0 or "pip install 'cascade-vision[" in stderr


def test_extras_are_those_of_the_project() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    homes = packages_distributions()
    for module, extra in EXTRAS.items():
        named = {canonicalize_name(Requirement(line).name) for line in extras[extra]}
        assert named & {canonicalize_name(name) for name in homes.get(module, [module])}, module


def test_library(monkeypatch: pytest.MonkeyPatch) -> None:
    assert library("json").dumps
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ExtraError, match=r"faiss is not installed: pip install 'cascade-vision\[cpu\]' \(or \[gpu\]"):
        library("faiss")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        library("no_such_module")
    assert missing(ModuleNotFoundError("no name")) is None
