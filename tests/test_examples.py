"""Every example runs from the repository root as its docstring says, and prints what it promises."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow

EXAMPLES = ROOT / "examples"
PHOTOS = sorted((ROOT / "tests" / "data" / "photos").iterdir())
COMMANDS = Path(sys.executable).parent  # where `cascade` is


def run(name: str, *arguments: str | Path) -> list[str]:
    """The lines that an example prints."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{COMMANDS}:{os.environ['PATH']}"}
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_predict_shows_an_error_beside_the_answers(tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"not an image")
    good, bad = run("predict", PHOTOS[0], tmp_path / "broken.jpg")
    assert PHOTOS[0].name in good and "masks" in good
    assert "not_an_image" in bad


def test_train_writes_a_bundle_that_answers(tmp_path: Path, cifar_folder: Path) -> None:
    out = tmp_path / "store" / "mine" / "1"
    lines = run("train", cifar_folder, out)
    assert (out / "cascade.json").exists() and "cluster" in lines[-1]


def test_serve_and_ask_answers_every_image() -> None:
    lines = run("serve_and_ask", *PHOTOS[:2])
    assert "paper" in lines[0]
    assert [photo.name for photo in PHOTOS[:2] if photo.name in "".join(lines)] == [photo.name for photo in PHOTOS[:2]]
    assert "error" not in "".join(lines)


def test_batch_to_duckdb_counts_every_image(tmp_path: Path) -> None:
    lines = run("batch_to_duckdb", PHOTOS[0].parent, tmp_path / "predictions")
    assert lines[0].startswith(f"{len(PHOTOS)} rows in") and "errors: none" in lines[0]
    counts = [
        int(line.split("│")[2]) for line in lines if line.count("│") == 4 and line.split("│")[2].strip().isdecimal()
    ]
    assert sum(counts) == len(PHOTOS)


def test_search_finds_the_image_itself_first() -> None:
    first, *others = run("search", PHOTOS[0].parent, PHOTOS[3])
    assert first == f"1.000  {PHOTOS[3]}" and len(others) == 4


def test_custom_router_moves_images_to_the_favored_cluster() -> None:
    plain = [line.partition("cluster ")[2] for line in run("predict", *PHOTOS)]
    favored = run("custom_router")
    assert len(favored) == len(PHOTOS)
    assert sum("cluster 0" in line for line in favored) >= sum(line.startswith("0") for line in plain)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_short_and_tested(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 40
    assert f'run("{path.stem}"' in Path(__file__).read_text()
