"""The documentation site builds without a warning, and a browser loads nothing from third parties to show it."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.core import TyperGroup
from typer.main import get_command

from cascade.cli.main import app
from tests.conftest import need
from tests.helpers.paths import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; ``--strict`` turns warnings (broken links, pages missing from the navigation) into errors."""
    need(find_spec("material") and find_spec("mkdocstrings"), "mkdocs-material and mkdocstrings (extra docs)")
    out = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def test_no_page_loads_anything_from_a_third_party(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        loaded = re.findall(r'<(?:script|img|iframe)[^>]+src="([^"]+)"|<link[^>]+href="([^"]+)"', page.read_text())
        assert not [url for pair in loaded for url in pair if re.match(r"(https?:)?//", url)], page


def test_the_command_line_reference_has_every_command(site: Path) -> None:
    page = (site / "cli" / "index.html").read_text()
    group = get_command(app)
    assert isinstance(group, TyperGroup)
    for name, command in group.commands.items():
        assert f"<code>cascade {name}</code>" in page, name
        for option in (option for parameter in command.params for option in parameter.opts):
            assert option.lstrip("-") in page, (name, option)


def test_the_python_reference_has_every_public_name(site: Path) -> None:
    import cascade

    page = (site / "api" / "index.html").read_text()
    for name in cascade.__all__:
        assert f'id="cascade.{name}"' in page, name


def test_formulas_are_mathml(site: Path) -> None:
    page = (site / "method" / "index.html").read_text()
    assert page.count("<math") > 10 and "arithmatex" not in page
