"""A run's numbers: saved once, never gone on with under others, and every one of them an option."""

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest

from cascade.errors import CascadeError
from training.pipeline import command
from training.recipe import ABOUT, LITE0, Recipe, paper
from training.run import parser, recipe_of

OTHER = {
    "all": "random",
    "off": "bf16",
    "adam": "rms-sgd",
    "prototypes": "gmm",
    "one": "padded",
    "scale": "none",
    "conditional": "dispatcher",
}


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    recipe = Recipe("photos", size=64, global_scale=(0.2, 0.9), lr=0.1, queue_from=1 / 3)
    recipe.save(tmp_path / "run")
    assert Recipe.load(tmp_path / "run") == recipe
    recipe.save(tmp_path / "run")  # the same again is gone on with
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["recipe.json"]


def test_a_run_is_not_gone_on_with_under_another_recipe(tmp_path: Path) -> None:
    Recipe("photos").save(tmp_path)
    (tmp_path / "dispatcher").mkdir()
    before = (tmp_path / "recipe.json").read_bytes()
    with pytest.raises(CascadeError, match="begun with other settings; choose another --run folder") as told:
        Recipe("photos", lr=0.5).save(tmp_path)
    assert "\n" not in str(told.value) and (tmp_path / "recipe.json").read_bytes() == before


def test_a_start_that_failed_before_its_first_step_binds_nobody(tmp_path: Path) -> None:
    Recipe("fotos").save(tmp_path)
    (tmp_path / "train.json").write_text("{}")
    Recipe("photos", lr=0.5).save(tmp_path)
    assert Recipe.load(tmp_path) == Recipe("photos", lr=0.5) and not (tmp_path / "train.json").exists()


def test_a_run_that_was_not_begun_says_how(tmp_path: Path) -> None:
    with pytest.raises(CascadeError, match="no run at .*: start it with python -m training.dispatcher"):
        Recipe.load(tmp_path)


def test_a_recipe_of_another_version_is_read_as_far_as_it_is_known() -> None:
    data = json.loads(json.dumps(asdict(Recipe("photos", steps=7)))) | {"an_option_of_tomorrow": 1}
    assert Recipe.from_json(data) == Recipe("photos", steps=7)
    assert Recipe.from_json({"data": "photos"}) == Recipe("photos")


def test_weights_come_from_where_the_backbone_has_them() -> None:
    assert Recipe("photos").source == LITE0
    assert Recipe("photos", backbone="resnet50").source == "timm"
    assert Recipe("photos", backbone="resnet50", source="random:0").source == "random:0"


@pytest.mark.parametrize(
    "wrong",
    [
        {"share": 1.5},
        {"select_share": -0.1},
        {"accumulate": 0},
        {"batch": 0},
        {"steps": -5},
        {"clusters": -1},
        {"lr": -1.0},
    ],
)
def test_numbers_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(CascadeError, match="is a share|must be at least 1|can't be negative"):
        Recipe("photos", **wrong)


def test_a_supervised_mask_has_no_clusters() -> None:
    assert Recipe("photos", labels=True, clusters=5).clusters == 0
    assert Recipe("photos", clusters=5).clusters == 5


def test_crops_scale_with_the_input_and_stay_on_a_grid() -> None:
    assert Recipe("").crops(224) == ((2, 224, (0.14, 1.0)), (6, 96, (0.05, 0.14)))
    assert Recipe("").crops(64) == ((2, 64, (0.14, 1.0)), (6, 24, (0.05, 0.14)))
    assert Recipe("").crops(8)[1][1] == 8
    assert Recipe("", local_crops=0).crops(64) == ((2, 64, (0.14, 1.0)),)


def test_the_papers_setting() -> None:
    recipe = paper("cifar10")
    published = {
        "optimizer": "sgd",
        "lr": 50.0,
        "initial": 1.0,
        "threshold": 0.0,
        "train_norms": True,
        "mask_from": "0",
        "batch": 64,
        "global_crops": 2,
        "local_crops": 6,
        "temperature": 0.1,
        "epsilon": 0.05,
        "iterations": 3,
        "projection": 128,
        "prototypes": 500,
        "queue": 512,
        "queue_from": 0.2,
        "head_lr": 0.15,
        "head_decay": 1e-6,
        "clusters": 5,
        "router": "gmm",
        "slots": "padded",
        "dim": 0,
        "neighbours": 200,
    }
    assert {name: getattr(recipe, name) for name in published} == published
    assert recipe.steps == recipe.expert_steps == 150 * 50_000 // 64


@pytest.mark.parametrize("name", [f.name for f in fields(Recipe)])
def test_every_number_is_an_option(name: str) -> None:
    default = Recipe("photos")
    assert recipe_of(parser("", recipe=True).parse_args(["photos"])) == default
    value = getattr(default, name)
    flag = f"--{name.replace('_', '-')}"
    if name == "data":
        assert recipe_of(parser("", recipe=True).parse_args(["pets"])).data == "pets"
        return
    if isinstance(value, bool):
        arguments, expected = [flag], True
    elif isinstance(value, tuple):
        arguments, expected = [flag, "0.3", "0.7"], (0.3, 0.7)  # type: ignore[assignment]
    elif isinstance(value, str):
        expected = OTHER.get(value, "7")  # type: ignore[assignment]
        arguments = [flag, str(expected)]
    else:
        shares = ("share", "select_share", "warmup")
        expected = 0.25 if name in shares else type(value)(value + 2)  # type: ignore[assignment]
        arguments = [flag, str(expected)]
    if name == "source":
        expected = "random:1"  # type: ignore[assignment]
        arguments = [flag, "random:1"]
    got = recipe_of(parser("", recipe=True).parse_args(["photos", *arguments]))
    assert getattr(got, name) == expected != value
    unchanged = {"clusters"} if name == "labels" else {"source"} if name == "backbone" else set()
    kept = {f.name: getattr(default, f.name) for f in fields(Recipe) if f.name in unchanged | {name}}
    assert replace(got, **kept) == default


@pytest.mark.parametrize(
    "arguments, what", [(["--router", "oracle"], "'oracle'"), (["--mask-form", "0"], "--mask-form"), ([], "--out")]
)
def test_a_slip_in_the_options_is_one_line(arguments: list[str], what: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as told:
        command(["photos", *arguments, *(["--out", "store/photos/1"] if arguments else [])])
    (line,) = capsys.readouterr().err.splitlines()
    assert told.value.code == 2 and line.startswith("error: ") and what in line and line.endswith("shows the options")


def test_help_says_what_every_option_means(capsys: pytest.CaptureFixture[str]) -> None:
    assert [name for meanings in ABOUT.values() for name in meanings if len(meanings[name]) < 8] == []
    assert sorted(name for meanings in ABOUT.values() for name in meanings) == sorted(f.name for f in fields(Recipe))
    with pytest.raises(SystemExit) as told:
        command(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert told.value.code == 0 and "DATA --out BUNDLE" in shown
    assert all(" ".join(each.split()[:3]) in shown for meanings in ABOUT.values() for each in meanings.values())


def test_a_preset_is_where_the_options_start_from(tmp_path: Path) -> None:
    """It stops at the missing folder, after the recipe was saved."""
    run = tmp_path / "run"
    with pytest.raises(SystemExit, match="is not a folder"):
        command(
            [
                *(str(tmp_path / "none"), "--preset", "paper", "--steps", "9", "--seed", "3"),
                *("--backbone", "test_resnet", "--source", "random:0"),
                *("--run", str(run), "--out", str(tmp_path / "store" / "a" / "1")),
            ]
        )
    expected = replace(paper(str(tmp_path / "none")), steps=9, seed=3, backbone="test_resnet", source="random:0")
    assert Recipe.load(run) == expected
