"""The base install: every command of an extra ends with the line that names it, and the rest works without extras."""

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


def base(program: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run a program as after ``pip install cascade-vision``, without any extra."""
    # FastAPI needs OpenTelemetry's interface, so the extra adds only what implements it.
    blocked = EXTRAS.keys() - {"torchserve", "opentelemetry"} | {"opentelemetry.sdk", "opentelemetry.exporter"}
    code = BASE % sorted(blocked) + program
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_of_an_extra_names_it(command: str) -> None:
    done = base("from cascade.cli.main import app; app()", *COMMANDS[command])
    assert done.returncode == 1, done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "is not installed: pip install 'cascade-vision[" in line


@pytest.mark.parametrize("command", ["train", "predict", "serve", "evaluate", "index", "inspect"])
def test_help_is_no_traceback(command: str) -> None:
    done = base("from cascade.cli.main import app; app()", command, "--help")
    assert "Traceback" not in done.stderr
    assert done.returncode == 0 or "pip install 'cascade-vision[" in done.stderr


def test_runtime_and_asgi_server_need_no_extra() -> None:
    done = base("import cascade, handlers.asgi.worker, handlers.asgi.app; cascade.load, cascade.Engine, cascade.Client")
    assert done.returncode == 0, done.stderr


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
