"""A run: the same inputs give the same bytes, by stages or in one go, and whatever stops it."""

import runpy
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from cascade.bundle.format import read
from cascade.cli.main import app
from cascade.errors import CascadeError
from tests.helpers.training import OPTIONS, content, flat, recipe, train
from training import clusters, dispatcher, evaluate, experts, export
from training.cli import Watch
from training.run import begin, resume

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("threads_are_started")]


@pytest.fixture(scope="module")
def once(cifar_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that was made in one go."""
    return train(tmp_path_factory.mktemp("once"), recipe(cifar_folder, router="gmm"))


def test_same_inputs_same_bytes_wherever_they_lie(once: Path, cifar_folder: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(cifar_folder, tmp_path / "elsewhere" / cifar_folder.name)
    again = train(tmp_path, recipe(moved, router="gmm"))
    assert content(again) == content(once) and len(content(once)) == 8


def module(name: str, *arguments: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """``python -m training.<name>`` in this process."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    monkeypatch.delitem(sys.modules, f"training.{name}", raising=False)  # it may run more than once
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"training.{name}", run_name="__main__")
    assert not end.value.code


def test_stage_by_stage_gives_what_all_in_a_row_give(
    once: Path, cifar_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = tmp_path / "run", tmp_path / "store" / "small" / "1"
    options = [[f"--{n.replace('_', '-')}", v] for n, v in (OPTIONS | {"router": "gmm"}).items()]
    module("dispatcher", cifar_folder, "--run", run, *sum(options, []), monkeypatch=monkeypatch)
    module("clusters", "--run", run, monkeypatch=monkeypatch)
    for some in (("2",), ("0", "1")):  # in any order, by whomever
        only = [word for number in some for word in ("--only", number)]
        module("experts", "--run", run, *only, monkeypatch=monkeypatch)
    module("evaluate", "--run", run, monkeypatch=monkeypatch)
    module("export", "--run", run, "--out", out, monkeypatch=monkeypatch)
    assert content(out) == content(once)


def test_stopped_at_every_stage_it_goes_on_to_the_same_bytes(
    once: Path, cifar_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for stage, name in ((clusters, "fit"), (experts, "train"), (evaluate, "evaluate"), (export, "export")):
        with monkeypatch.context() as patch:
            patch.setattr(stage, name, stop)
            with pytest.raises(KeyboardInterrupt):
                train(tmp_path, recipe(cifar_folder, router="gmm"))
    assert content(train(tmp_path, recipe(cifar_folder, router="gmm"))) == content(once)


def test_another_recipe_in_the_same_folder_is_refused(once: Path, cifar_folder: Path) -> None:
    run, done = once.parents[2] / "run", once.parents[2] / "run" / "dispatcher" / "done.safetensors"
    before = done.read_bytes()
    with pytest.raises(CascadeError, match="started with other settings; choose another --run folder"):
        begin(run, recipe(cifar_folder, router="gmm", lr=0.7), Watch(None))
    assert done.read_bytes() == before


def test_other_images_in_the_same_run_are_refused(tmp_path: Path, cifar: list[Image.Image]) -> None:
    folder = flat(cifar, tmp_path / "photos", 60)
    settings = recipe(folder, clusters=0)
    dispatcher.train(begin(tmp_path / "run", settings, Watch(None)))
    cifar[70].save(folder / "another.png")
    with pytest.raises(
        CascadeError, match="images of .*photos are not those that .*run was started with: put them back"
    ):
        train(tmp_path, settings)
    (folder / "another.png").unlink()
    assert read(train(tmp_path, settings)).card.training["images"] == 48


def test_a_stage_without_the_one_before_says_which(tmp_path: Path, cifar: list[Image.Image]) -> None:
    settings = recipe(flat(cifar, tmp_path / "photos", 60), clusters=2)
    run = begin(tmp_path / "run", settings, Watch(None))
    with pytest.raises(CascadeError, match=r"dispatcher/done.safetensors does not exist yet: train dispatcher first"):
        clusters.fit(run)
    with pytest.raises(CascadeError, match=r"clusters.safetensors does not exist yet: run python -m training.clusters"):
        experts.train(run)
    with pytest.raises(CascadeError, match="no run at .*: start it with python -m training.dispatcher"):
        resume(tmp_path / "another", Watch(None))


@pytest.mark.parametrize("name", ["dispatcher", "clusters", "experts", "evaluate", "export", "pipeline"])
def test_every_stage_explains_itself(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module(name, "--help", monkeypatch=monkeypatch)
    shown = capsys.readouterr().out
    assert "--run" in shown
    assert ("--mask-from" in shown) == (name in ("dispatcher", "pipeline"))


def test_cascade_train_has_the_pipelines_options() -> None:
    done = CliRunner().invoke(app, ["train", "--help"])
    assert done.exit_code == 0 and "--mask-from" in done.stdout and "--controls" in done.stdout
