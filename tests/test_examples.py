"""Every example runs from the repository root as its docstring says, and prints what it promises."""

import os
import runpy
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT
from training import heads

pytestmark = pytest.mark.slow

EXAMPLES = ROOT / "examples"
PHOTOS = sorted((ROOT / "tests" / "data" / "photos").iterdir())
COMMANDS = Path(sys.executable).parent  # where `cascade` is


def run(name: str, *arguments: str | Path) -> list[str]:
    """The lines that an example prints. It runs in this process, which has imported everything."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as printed:
        patch.chdir(ROOT)
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("PATH", f"{COMMANDS}:{os.environ['PATH']}")
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        patch.setattr(heads, "PENALTIES", (1.0,))  # to choose one takes most of the time of a short training
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return printed.getvalue().splitlines()


@pytest.fixture(scope="module")
def predicted(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What examples/predict.py says of all photos, and of a file that is no image."""
    (broken := tmp_path_factory.mktemp("broken") / "broken.jpg").write_bytes(b"not an image")
    return run("predict", *PHOTOS, broken)


def test_predict_shows_an_error_beside_the_answers(predicted: list[str]) -> None:
    *good, bad = predicted
    assert len(good) == len(PHOTOS)
    assert all(photo.name in line and "masks" in line for photo, line in zip(PHOTOS, good, strict=True))
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


def test_custom_router_moves_images_to_the_favored_cluster(predicted: list[str]) -> None:
    plain = [line.partition("cluster ")[2] for line in predicted]
    favored = run("custom_router")
    assert len(favored) == len(PHOTOS)
    assert sum("cluster 0" in line for line in favored) >= sum(line.startswith("0") for line in plain)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_short_and_tested(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 40
    assert f'run("{path.stem}"' in Path(__file__).read_text()
