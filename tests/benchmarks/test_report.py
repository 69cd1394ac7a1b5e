"""The JSON of a benchmark says what it was measured with, and nothing of the tests influences it."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.report import figure, report
from cascade import __version__
from tests.helpers.paths import ROOT


def test_the_last_line_records_executor_versions_and_threads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CASCADE_EXECUTOR", "plain")
    report("x", {"ratio": figure([1.0, 3.0, 2.0], ">= 1.5")}, executor="FoldedExecutor", out=tmp_path / "x.json")
    line = capsys.readouterr().out.splitlines()[-1]
    body = json.loads(line)
    assert json.loads((tmp_path / "x.json").read_text()) == body
    assert body["figures"] == {"ratio": {"value": 2.0, "goal": ">= 1.5", "met": True, "spread": [1.0, 3.0]}}
    assert body["executor"] == "FoldedExecutor" and body["environment"]["CASCADE_EXECUTOR"] == "plain"
    assert body["versions"]["cascade-vision"] == __version__, "installed in editable mode, its metadata may be older"
    assert body["versions"]["torch"] and body["threads"] >= 1 and len(body["load"]) == 3


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").rglob("*.py")), ids=lambda path: path.stem)
def test_benchmarks_import_nothing_from_tests(path: Path) -> None:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    assert not [name for name in names if name.split(".")[0] == "tests"]


def test_importing_the_tests_leaves_the_environment_alone() -> None:
    code = (
        "import os; before = dict(os.environ); import tests.conftest, tests.environment; assert dict(os.environ)"
        " == before"
    )
    clean = {k: v for k, v in os.environ.items() if k not in ("CASCADE_EXECUTOR", "OMP_NUM_THREADS")}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=clean | {"PYTHONPATH": str(ROOT)}, check=True)
