"""Presets and options of the experiments, their tables, and what a command has cost."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from cascade.errors import CascadeError
from training.cli import Watch
from training.cost import Cost
from training.experiments import embeddings, error_bars, lab, main, report, sparsity, supervised, topk
from training.experiments.report import Table


def opened(*settings: str, preset: Literal["small", "paper"] = "small", **options: Any) -> lab.Lab:
    changes = options.pop("small", {})
    return lab.open_lab(preset, changes, Watch(None), **{"out": Path("runs"), "settings": settings, **options})


def test_options_go_over_the_experiment_and_that_over_the_preset(tmp_path: Path) -> None:
    made = opened("steps=7", "train_norms=true", "global_scale=0.5,1", small={"steps": 9, "dim": 11})
    assert (made.recipe.steps, made.recipe.dim, made.recipe.lr) == (7, 11, lab.SMALL.lr)
    assert made.recipe.train_norms and made.recipe.global_scale == (0.5, 1.0)
    assert made.data == ("cifar10",) and made.seeds == (0, 1, 2) and made.small
    assert opened(seeds=2, data=("a", "b")).data == ("a", "b")
    for wrong in ("lr", "lr=", "lr=fast", "train_norms=1", "no_such=1"):
        with pytest.raises(CascadeError, match="--set"):
            opened(wrong)


def test_the_papers_preset_says_what_to_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CascadeError, match="dl.fbaipublicfiles.com/deepcluster/swav_800ep_pretrain.pth.tar"):
        opened(preset="paper")
    (tmp_path / lab.SWAV).touch()
    paper = asdict(opened(preset="paper").recipe)
    published = {"backbone": "resnet50", "optimizer": "sgd", "lr": 50.0, "batch": 64, "prototypes": 500, "queue": 512}
    published |= {"initial": 1.0, "threshold": 0.0, "neighbors": 200, "train_norms": True, "local_crops": 6}
    assert published.items() <= paper.items()


def test_data_that_is_missing_is_noted(cifar_folder: Path, tmp_path: Path) -> None:
    made = opened(data=(str(tmp_path / "nothing"), str(cifar_folder)))
    assert list(made.sets()) == [str(cifar_folder)] and "not run:" in made.notes[0]
    with pytest.raises(CascadeError, match="none of the data sets"):
        list(opened(data=(str(tmp_path / "nothing"),)).sets())


def test_epochs_become_steps_of_each_data_set(cifar_folder: Path, tmp_path: Path) -> None:
    made = opened(out=tmp_path, data=(str(cifar_folder),), small={"epochs": 3})
    run = made.run(limit=160, batch=32)
    assert (run.recipe.steps, run.recipe.expert_steps) == (15, 15)
    assert made.run(limit=160, batch=32, epochs=2).recipe.steps == 10
    assert made.run(limit=160, batch=32).folder == run.folder != made.run(limit=160, batch=32, seed=1).folder


def test_a_table_has_mean_and_deviation_and_the_papers_value(tmp_path: Path) -> None:
    table = Table("T", published={"a": {"x": 3.0}})
    table.add("a", {"x": 1.0})
    table.add("a", {"x": 3.0, "y": 5.0})
    assert table.markdown().splitlines()[2:] == ["| | x | y |", "|---|---|---|", "| a | 2.0 ± 1.4 (3.0) | 5.0 |"]
    text = report.write(tmp_path / "t", [table], {"preset": "small"}, ["a note"])
    assert (tmp_path / "t.md").read_text() == text and "- a note" in text
    cell = json.loads((tmp_path / "t.json").read_text())["tables"][0]["rows"]["a"]["x"]
    assert cell == {"mean": 2.0, "std": pytest.approx(2**0.5, abs=1e-6), "values": [1.0, 3.0]}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.json", "t.md"]


def test_cost_has_money_for_a_price() -> None:
    with Cost(price=3600.0) as cost:
        sum(range(200_000))
    facts = cost.facts()
    assert facts["money"] == pytest.approx(cost.seconds, abs=0.01) and facts["peak MB"] > 10
    assert "money" not in Cost().facts()


def test_published_columns_are_those_that_the_tables_have() -> None:
    """A published value whose column has another name would never be shown."""
    names = {"k-NN", "k-NN whitened", "probe", "probe whitened", "accuracy", "active %"}
    for module in (main, supervised, topk):
        for cells in module.PUBLISHED.values():
            assert {c.partition(" ")[2] for c in cells} <= names
    assert set(sparsity.PUBLISHED["rn50-swav, supervised"]) == set(sparsity.SETS)
    assert error_bars.PUBLISHED["dtd k-NN"]["all"] == pytest.approx(
        np.mean([v for c, v in error_bars.PUBLISHED["dtd k-NN"].items() if c != "all"]), abs=0.1
    )


def test_names_of_blocks_and_kinds() -> None:
    assert sparsity.block("layer1.0.conv1.weight") == "layer1.0"
    assert sparsity.kind_of("layer1.0.conv1.weight", 0) == "conv1.weight"
    assert sparsity.block("blocks.3.attn.qkv.weight") == "blocks.3"
    assert sparsity.kind_of("blocks.3.attn.qkv.bias", 1) == "attn.key.bias"
    assert sparsity.block("blocks.5.2.conv_pwl.weight") == "blocks.5.2"
    assert sparsity.block("layer4.0.downsample.0.weight") == "layer4.0"
    assert sparsity.kind_of("layer4.0.downsample.0.weight", 0) == "downsample.0.weight"
    assert sparsity.block("conv_stem.weight") == "conv_stem" and sparsity.kind_of("conv_stem.weight", 0) == "weight"


def test_common_classes_are_cumulated() -> None:
    classes, assigned = np.array([0, 0, 0, 1, 2, 2, 1]), np.array([0, 0, 0, 0, 1, 1, 1])
    shares = embeddings.common_classes(classes, assigned)
    assert [s.tolist() for s in shares] == [[75, 100, 100], [pytest.approx(200 / 3), 100, 100]]
