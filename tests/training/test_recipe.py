"""A run's numbers: saved once, and never gone on with under others."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from cascade.errors import CascadeError
from training.recipe import LITE0, Recipe, paper


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
    with pytest.raises(CascadeError, match="started with other settings; choose another --run folder") as told:
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


def test_experts_with_labels_have_no_prototypes_to_be_routed_by() -> None:
    assert Recipe("photos", labels=True, clusters=5).router == "centroid"
    assert Recipe("photos", clusters=5).router == "prototypes"


def test_without_labels_it_is_distilled_unless_clusters_or_swav_are_wanted() -> None:
    assert (Recipe("photos").kind, Recipe("photos").adapt) == ("distill", "both")
    assert (Recipe("photos", clusters=5).kind, Recipe("photos", clusters=5).adapt) == ("swav", "mask")
    both = Recipe("photos", objective="distill+swav")
    assert (both.kind, both.adapt) == ("swav", "both")
    assert (Recipe("photos", labels=True).kind, Recipe("photos", labels=True).bank) == ("labels", 0)
    experts = Recipe("photos", objective="distill", clusters=2)
    assert (experts.kind, experts.adapt, experts.router, experts.layout) == ("distill", "both", "centroid", "routed")
    with pytest.raises(CascadeError, match="--clusters needs the backbone itself as the teacher"):
        Recipe("photos", objective="distill", clusters=2, teacher="resnet50")


@pytest.mark.parametrize("wrong", [{"clusters": 2, "labels": True}, {"clusters": 2}, {"objective": "swav"}])
def test_a_delta_is_of_one_copy(wrong: dict[str, Any]) -> None:
    with pytest.raises(CascadeError, match="--adapt delta compresses one fine-tuned copy"):
        Recipe("photos", adapt="delta", **wrong)


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
        "neighbors": 200,
    }
    assert {name: getattr(recipe, name) for name in published} == published
    assert recipe.steps == recipe.expert_steps == 150 * 50_000 // 64
