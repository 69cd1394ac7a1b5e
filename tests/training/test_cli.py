"""The command line of a stage: every one of the recipe's numbers is an option, and says what it means."""

from dataclasses import fields, replace
from pathlib import Path

import pytest

from training.cli import start, with_recipe
from training.pipeline import command
from training.recipe import ABOUT, Recipe, paper

OTHER = {
    "all": "random",
    "off": "bf16",
    "adam": "rms-sgd",
    "prototypes": "gmm",
    "one": "padded",
    "scale": "none",
    "conditional": "dispatcher",
}


OTHER_OF = {"objective": "swav", "adapt": "channels"}


def parsed(*arguments: str) -> Recipe:
    """The recipe that the options give."""
    found: list[Recipe] = []

    @with_recipe
    def command(recipe: Recipe) -> None:
        found.append(recipe)

    with pytest.raises(SystemExit) as done:
        start(command, arguments)
    assert done.value.code == 0
    return found[0]


def train(*arguments: str) -> None:
    """As ``cascade train``."""
    start(command, arguments, "cascade train")


@pytest.mark.parametrize("name", [f.name for f in fields(Recipe)])
def test_every_number_is_an_option(name: str) -> None:
    default = Recipe("photos")
    assert parsed("photos") == default
    value = getattr(default, name)
    flag = f"--{name.replace('_', '-')}"
    if name == "data":
        assert parsed("pets").data == "pets"
        return
    if isinstance(value, bool):
        arguments, expected = [flag], True
    elif isinstance(value, tuple):
        arguments, expected = [flag, "0.3", "0.7"], (0.3, 0.7)  # type: ignore[assignment]
    elif isinstance(value, str):
        expected = OTHER_OF.get(name) or OTHER.get(value, "7")  # type: ignore[assignment]
        arguments = [flag, str(expected)]
    else:
        shares = ("share", "select_share", "warmup", "label_smoothing")
        expected = 0.25 if name in shares else type(value)(value + 2)  # type: ignore[assignment]
        arguments = [flag, str(expected)]
    if name == "source":
        expected = "random:1"  # type: ignore[assignment]
        arguments = [flag, "random:1"]
    got = parsed("photos", *arguments)
    assert getattr(got, name) == expected != value
    follow = {  # what an option decides beside itself
        "labels": {"clusters", "bank", "router"},
        "backbone": {"source"},
        "clusters": {"objective", "adapt"},
        "objective": {"adapt"},
    }
    unchanged = follow.get(name, set())
    kept = {f.name: getattr(default, f.name) for f in fields(Recipe) if f.name in unchanged | {name}}
    assert replace(got, **kept) == default


@pytest.mark.parametrize(
    "arguments, what", [(["--router", "oracle"], "'oracle'"), (["--mask-form", "0"], "--mask-form"), ([], "--out")]
)
def test_a_slip_in_the_options_is_explained(
    arguments: list[str], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as told:
        train("photos", *arguments, *(["--out", "store/photos/1"] if arguments else []))
    shown = capsys.readouterr().err
    assert told.value.code == 2 and what in shown and "Usage: cascade train" in shown and "Traceback" not in shown


def test_help_says_what_every_option_means(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")  # one line for each
    assert [name for meanings in ABOUT.values() for name in meanings if len(meanings[name]) < 8] == []
    assert sorted(name for meanings in ABOUT.values() for name in meanings) == sorted(f.name for f in fields(Recipe))
    with pytest.raises(SystemExit) as told:
        train("--help")
    shown = capsys.readouterr().out
    assert told.value.code == 0 and "Usage: cascade train" in shown and "--out" in shown
    for meanings in ABOUT.values():
        for name, meaning in meanings.items():
            flag = "DATA" if name == "data" else f"--{name.replace('_', '-')}"
            assert any(f" {flag} " in line and meaning[:40] in line for line in shown.splitlines()), name


def test_a_preset_is_where_the_options_start_from(tmp_path: Path) -> None:
    """It stops at the missing folder, after the recipe was saved."""
    run = tmp_path / "run"
    with pytest.raises(SystemExit, match="is not a folder"):
        train(
            *(str(tmp_path / "none"), "--preset", "paper", "--steps", "9", "--seed", "3"),
            *("--backbone", "test_resnet", "--source", "random:0"),
            *("--run", str(run), "--out", str(tmp_path / "store" / "a" / "1")),
        )
    expected = replace(paper(str(tmp_path / "none")), steps=9, seed=3, backbone="test_resnet", source="random:0")
    assert Recipe.load(run) == expected
